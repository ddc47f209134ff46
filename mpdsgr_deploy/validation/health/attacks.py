"""Check that the attacks are as strong as they claim to be."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mpdsgr_deploy.attacks.suite_measurement import union
from mpdsgr_deploy.attacks.tiers import BY_STRENGTH, required_surrogates
from mpdsgr_deploy.validation.health.check_registry import (
    Bools,
    Convergence,
    Reach,
    Search,
    Seen,
    Slopes,
    Verdicts,
    health_check,
)
from mpdsgr_deploy.validation.proportions import binomial_tail, exceeds

ORDER_P = 0.01  # p-value below which it is a fault that a stronger attack breaks fewer images
EDITED_P = 1e-6  # the same for each single attack on artefact and reference; an edited reference is far below it
MAX_ZERO_GRADIENTS = 0.05  # largest share of gradients that may be zero in all pixels
MAX_AT_LARGE_EPS = 0.1  # largest accuracy at an eps within which an attack can make any image
MIN_STEEPER = 0.8  # smallest share of images whose loss rises further along the gradient than in random directions
MAX_MORE_STEPS = 0.05  # largest share of all images that twice the steps may break in addition
MAX_SEARCHED = 0.05  # largest share of all images that search may break where attacks with gradients did not


@health_check(
    1,
    "attacked images obey the rules",
    why="larger changes than eps break any network, and images rounded to 8 bits are weaker attacks",
    advice="an attack that breaks these rules proves nothing; please report it as a bug of the attack",
)
def check_budget(budget_faults: Sequence[str], rule: str) -> Seen:
    """Check that attacked images obey the rules of their attack. rule: says which images were attacked."""
    return Seen(budget_faults, f"{rule}: attacked pixels finite, in [0, 1], within eps and not rounded to 8 bits")


@health_check(
    2,
    "stronger attacks break more",
    why=(
        "if an attack of one step breaks more images than one of many steps, the gradient points in wrong "
        "directions: it is masked"
    ),
    advice="do not rely on any of these accuracies before you have attacked with other surrogates, APGD and Square",
)
def check_order(verdicts: Verdicts) -> Seen:
    """Check that accuracy does not rise, beyond chance, along BY_STRENGTH: from noise and FGSM to all attacks."""
    return ordered(verdicts, BY_STRENGTH)


@health_check(
    3,
    "black-box attacks do not break more than white-box attacks",
    why=(
        "with the gradient an attacker can do everything that is possible without it; if it achieves less, the "
        "gradient is masked"
    ),
    advice="the network's own gradient is of little use to an attacker; attack through other surrogates and with APGD",
)
def check_black_box(verdicts: Verdicts, black_box: Sequence[str], white_box: Sequence[str]) -> Seen:
    """Check that attacks without the network's gradient break no more images than those with it, up to chance."""
    together = {"white-box": union(verdicts, white_box)} if white_box else {}
    pairs = [ordered({**verdicts, **together}, (name, "white-box")) for name in black_box]
    faults = [fault for seen in pairs for fault in seen.faults]
    return Seen(faults, "; ".join(seen.otherwise for seen in pairs) or "no black-box attack was made")


def ordered(verdicts: Verdicts, attacks: Sequence[str]) -> Seen:
    """Find attacks that break more images than their successor in `attacks`, weakest first, beyond chance."""
    faults = []
    for weaker, stronger in pairwise(attacks):
        only_weaker_breaks = int((~verdicts[weaker] & verdicts[stronger]).sum())
        only_stronger_breaks = int((verdicts[weaker] & ~verdicts[stronger]).sum())
        p = binomial_tail(only_weaker_breaks, only_weaker_breaks + only_stronger_breaks)
        if only_weaker_breaks > only_stronger_breaks and p < ORDER_P:
            faults.append(f"{weaker} breaks {only_weaker_breaks} images that {stronger} does not (p = {p:.2g})")
    shares = [f"{attack} {100 * verdicts[attack].mean():.1f} %" for attack in attacks]
    return Seen(faults, " >= ".join(shares))


@health_check(
    4,
    "accuracy falls to zero as eps grows",
    why="with eps 0.5 an image can be made uniformly grey, so an attack that fails there is broken",
    advice="the attack has no effect on the network; look at check 7 (gradients) and attack through other surrogates",
)
def check_growth(growth: Mapping[float, Bools]) -> Seen:
    """Check that accuracy under the strong PGD falls as eps grows, and is near zero at the largest eps.

    growth: verdicts [m] on the same images by eps.
    """
    radii = sorted(growth)
    named = {f"eps {eps:.3g}": growth[eps] for eps in radii}
    order = ordered(named, list(named))
    share = float(growth[radii[-1]].mean())
    fault = (
        [f"at eps {radii[-1]:.3g} {100 * share:.1f} % of the images are still correct"]
        if share > MAX_AT_LARGE_EPS
        else []
    )
    return Seen([*fault, *order.faults], order.otherwise)


@health_check(
    5,
    "more steps hardly strengthen the attack",
    why="an attack that stops too early counts images as robust that it would have broken",
    advice="validate with a larger tier, raise attack.strong_steps in the recipe, or promise a lower floor",
)
def check_convergence(convergence: Convergence) -> Seen:
    """Check that twice the steps break few further images, and that the floor of the worst case holds without these.

    Attacks on spiking networks have not been seen to converge: with more steps they go on to break images, ever more
    slowly. Artefact and reference are attacked with the same number of steps, so the drop between them is a fair
    comparison at any number. A floor is a statement about every attack, so it must hold with more steps as well.
    """
    broken, standing, n, attacks, worst, floor = convergence
    names = ", ".join(f"{name} with {2 * steps} steps instead of {steps}" for name, steps in attacks.items())
    saw = f"{names}: {broken} more of {n} images are broken, {standing - broken} are still correct"
    faults = [saw] if exceeds(broken, n, MAX_MORE_STEPS) < ORDER_P else []
    converged = worst - broken / n if n else worst
    if floor is not None and converged < floor <= worst:
        faults.append(
            f"{saw}; the accuracy of {worst:.2%} less these {broken / n:.2%} is below the gate's floor of "
            f"{floor:.2%} for worst"
        )
    return Seen(faults, saw)


@health_check(
    6,
    "other surrogates were tried",
    why="an attacker may use any surrogate gradient, and the one used in training is seldom the strongest",
    advice="use an unchanged tier; every tier attacks through several surrogates",
)
def check_sweep(surrogates: Sequence[str | None], trained: str) -> Seen:
    """Check that the attacks used surrogates of other widths and shapes than the trained one, and adaptive ones."""
    required, tried = required_surrogates(trained), set(surrogates)
    missing = [name for name in required if name not in tried]
    return Seen([f"missing: {', '.join(missing)}"] if missing else [], f"{trained} (trained), {', '.join(required)}")


@health_check(
    7,
    "gradients exist",
    why="an attack without gradients is no attack",
    advice=(
        "the surrogate of the training is too narrow to attack through, or the network saturates; see the attacks "
        "through other surrogates"
    ),
)
def check_gradients(gradients: tuple[int, int, int]) -> Seen:
    """Check that gradients through the trained surrogate are rarely zero and always finite.

    gradients: how many were computed, how many of these were zero, and how many not finite.
    """
    samples, zero, not_finite = gradients
    share = zero / samples if samples else 1.0
    saw = f"of {samples} gradients {100 * share:.2f} % were zero and {not_finite} were not finite"
    return Seen([saw] if not_finite or share > MAX_ZERO_GRADIENTS else [], saw)


@health_check(
    18,
    "the loss climbs along the gradient",
    why=(
        "a network can contain a branch that changes no answer and only adds a misleading gradient; the loss itself "
        "shows it"
    ),
    advice="do not trust gradients of this file; compare it with the weights (--rebuild) and attack without them",
)
def check_slopes(slopes: Slopes) -> Seen:
    """Check that the loss rises further along the gradient's signs than along random ones, on nearly all images."""
    steps = (
        f"{grad:+.2g} against {rand:+.2g} with a change of {step:.3g}" for step, (grad, rand) in slopes.rises.items()
    )
    saw = f"on {slopes.steeper} of {slopes.n} images further than in random directions; mean rise {', '.join(steps)}"
    return Seen([saw] if slopes.n and slopes.steeper < MIN_STEEPER * slopes.n else [], saw)


@health_check(
    19,
    "search without gradients breaks few further images",
    why="a manipulated network can hide most of its gradient, but not its answers, which are all that a search needs",
    advice="do not trust gradients of this file; compare it with the weights (--rebuild), or export it yourself",
)
def check_search(search: Search) -> Seen:
    """Check that random search breaks few of the images that survive all attacks with a gradient."""
    broken, standing, n, queries = search
    saw = (
        f"of {n} images attacks with gradients left {standing} correct; of these {queries} queries each break {broken}"
    )
    return Seen([saw] if exceeds(broken, n, MAX_SEARCHED) < ORDER_P else [], saw)


@health_check(
    13,
    "attacks on the artefact are as strong as on the reference",
    why=(
        "an export cannot add robustness; if it seems to, the artefact's gradient misleads the attack, or the attack "
        "is weaker"
    ),
    advice=(
        "validate with the settings of the export, or export again, and look for the node of the attack graph that "
        "loses the gradient"
    ),
)
def check_reach(reach: Reach, n: int) -> Seen:
    """Check that the artefact withstands the attacks no better than the reference, each one and all together.

    An attack that the reference should have met and has not is a fault. Without a reference, only floors decide.
    """
    if not reach.reference:
        return Seen([], "there is no reference for these images, so only the gate's floors decide", not_compared=True)
    if reach.contradictions:
        return Seen(
            [f"the reference counts {reach.contradictions} images as correct that its own attacks broke"],
            "",
        )
    if reach.missing:
        return Seen([f"the reference holds no results under {', '.join(reach.missing)} with these settings"], "")
    if reach.flips is None:
        return Seen(["the reference was attacked with none of these attacks"], "")
    worse, better = reach.flips.newly_wrong, reach.flips.newly_right
    p = binomial_tail(better, worse + better)
    saw = f"in the worst case {better} of {n} images newly right, {worse} newly wrong (p = {p:.2g})"
    if reach.alone:
        saw += f"; only the artefact was attacked with {', '.join(reach.alone)}"
    least = reach.allowed * n + 1e-9
    faults = [saw] if better - worse > least and p < ORDER_P else []
    for name, flips in reach.each.items():
        worse, better = flips.newly_wrong, flips.newly_right
        if better - worse > least and binomial_tail(better, worse + better) < EDITED_P:
            faults.append(f"under {name} {better} of {n} images newly right, {worse} newly wrong")
    return Seen(faults, saw)
