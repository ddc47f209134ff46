"""Check that the attacks are as strong as they claim to be."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mpdsgr_deploy.attacks.measure import union
from mpdsgr_deploy.attacks.tiers import BY_STRENGTH, required_surrogates
from mpdsgr_deploy.validation.health.registry import (
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

ORDER_P = 0.01  # p-value below which a stronger attack that leaves more accuracy is a fault
EDITED_P = 1e-6  # the same for one of many attacks, where an edited promise shows far below and chance never
MAX_ZERO_GRADIENTS = 0.05  # share of gradient evaluations that may vanish altogether
MAX_AT_LARGE_EPS = 0.1  # accuracy that may be left at an eps that lets an attack paint any image
MIN_STEEPER = 0.8  # share of images on which the gradient must beat random directions
MAX_MORE_STEPS = 0.05  # share of images that twice the steps may still break
MAX_SEARCHED = 0.05  # share of images that search may break where gradients broke nothing


@health_check(
    1,
    "attacked images obey the rules",
    why="images outside the ball break any network; images rounded to bytes are weaker attacks",
    advice="an attack that cheats proves nothing; report this as a bug of the attack",
)
def check_budget(budget_faults: Sequence[str], rule: str) -> Seen:
    """Check that the attacked images obey the attack's rules, and that it is stated which images they are."""
    return Seen(budget_faults, f"{rule}: attacked pixels finite, in [0, 1], within eps and not rounded to 8 bits")


@health_check(
    2,
    "stronger attacks break more",
    why="where one step breaks more than many, the gradient leads the attack astray: it is masked",
    advice="attack with other surrogates, and with APGD and Square, before believing any figure",
)
def check_order(verdicts: Verdicts) -> Seen:
    """Check accuracy under noise >= FGSM >= PGD >= strong PGD >= the union of all, up to chance."""
    return ordered(verdicts, BY_STRENGTH)


@health_check(
    3,
    "black-box does not beat white-box",
    why="an attacker with the gradient can do all that one without it can; if not, the gradient is masked",
    advice="the network's own gradient serves attackers badly: attack through other surrogates and with APGD",
)
def check_black_box(verdicts: Verdicts, black_box: Sequence[str], white_box: Sequence[str]) -> Seen:
    """Check that attacks without the network's gradient break no more images than those with it, up to chance."""
    together = {"white-box": union(verdicts, white_box)} if white_box else {}
    pairs = [ordered({**verdicts, **together}, (name, "white-box")) for name in black_box]
    faults = [fault for seen in pairs for fault in seen.faults]
    return Seen(faults, "; ".join(seen.otherwise for seen in pairs) or "no black-box attack was made")


def ordered(verdicts: Verdicts, attacks: Sequence[str]) -> Seen:
    """Whether none of `attacks`, weakest first, breaks more than its successor, beyond chance."""
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
    "accuracy falls to nothing as eps grows",
    why="with eps 0.5 and more an image can become any other: an attack that fails there is broken",
    advice="the attack does not reach the network: look at the gradients (check 7) and at other surrogates",
)
def check_growth(growth: Mapping[float, Bools]) -> Seen:
    """Check that accuracy under the strong PGD falls with eps, to zero where eps allows any image.

    growth: verdicts [m] on the same images by eps.
    """
    radii = sorted(growth)
    named = {f"eps {eps:.3g}": growth[eps] for eps in radii}
    order = ordered(named, list(named))
    share = float(growth[radii[-1]].mean())
    fault = [f"at eps {radii[-1]:.3g} {100 * share:.1f} % are left"] if share > MAX_AT_LARGE_EPS else []
    return Seen([*fault, *order.faults], order.otherwise)


@health_check(
    5,
    "more steps hardly help the attack",
    why="an attack stopped early counts images as robust that it was about to break",
    advice="validate with a larger tier, raise attack.strong_steps in the recipe, or promise a lower floor",
)
def check_convergence(convergence: Convergence) -> Seen:
    """Check that twice the steps break few surviving images, and that the floor of the worst case holds without them.

    No attack on a spiking network was seen to converge: small steps through weak gradients break images ever more
    slowly. The artefact and its reference meet the same steps, so the drop between them is a fair comparison at any
    number; a floor is not, because it is a statement about every attack.
    """
    broken, standing, n, attacks, worst, floor = convergence
    names = ", ".join(f"{name} with {2 * steps} steps instead of {steps}" for name, steps in attacks.items())
    saw = f"{names}: {broken} of {n} images more are broken, {standing - broken} are left"
    faults = [saw] if exceeds(broken, n, MAX_MORE_STEPS) < ORDER_P else []
    converged = worst - broken / n if n else worst
    if floor is not None and converged < floor <= worst:
        faults.append(
            f"{saw}; {worst:.2%} less these {broken / n:.2%} is below the floor {floor:.2%} of the worst case"
        )
    return Seen(faults, saw)


@health_check(
    6,
    "other surrogates were tried",
    why="the attacker chooses the surrogate, and the trained one is seldom the strongest",
    advice="use a tier as it comes; all of them sweep",
)
def check_sweep(surrogates: Sequence[str | None], trained: str) -> Seen:
    """Check that the attacker tried surrogates of other widths and shapes than the trained one, and adaptive ones."""
    required, tried = required_surrogates(trained), set(surrogates)
    missing = [name for name in required if name not in tried]
    return Seen([f"missing: {', '.join(missing)}"] if missing else [], f"{trained} (trained), {', '.join(required)}")


@health_check(
    7,
    "gradients exist",
    why="an attack without gradients is no attack",
    advice="the trained surrogate is too narrow to attack through, or the network saturates: see the sweep",
)
def check_gradients(gradients: tuple[int, int, int]) -> Seen:
    """Check that gradients through the trained surrogate rarely vanish and are always finite."""
    samples, zero, not_finite = gradients
    share = zero / samples if samples else 1.0
    saw = f"of {samples} gradients {100 * share:.2f} % were zero, {not_finite} not finite"
    return Seen([saw] if not_finite or share > MAX_ZERO_GRADIENTS else [], saw)


@health_check(
    18,
    "the loss climbs along the gradient",
    why="a branch that does nothing but add a gradient of its own leads attacks astray; the answers give it away",
    advice="do not trust gradients of this file: compare it with the weights (--rebuild), attack it by queries",
)
def check_slopes(slopes: Slopes) -> Seen:
    """Check that the loss rises further along the gradient's signs than along random ones, on nearly all images."""
    steps = (f"{grad:+.2g} against {rand:+.2g} at {step:.3g}" for step, (grad, rand) in slopes.rises.items())
    saw = f"further than along random directions on {slopes.steeper} of {slopes.n} images; mean rise {', '.join(steps)}"
    return Seen([saw] if slopes.n and slopes.steeper < MIN_STEEPER * slopes.n else [], saw)


@health_check(
    19,
    "search breaks little that gradients left",
    why="a decoy that weakens the gradient leaves some slope; a search that asks for answers alone is not led astray",
    advice="do not trust gradients of this file: compare it with the weights (--rebuild), or export it yourself",
)
def check_search(search: Search) -> Seen:
    """Check that random search breaks few of the images that survive all attacks with a gradient."""
    broken, standing, n, queries = search
    saw = f"{queries} queries break {broken} of the {standing} images that gradients left, of {n}"
    return Seen([saw] if exceeds(broken, n, MAX_SEARCHED) < ORDER_P else [], saw)


@health_check(
    13,
    "the attack reaches the artefact as it reached the reference",
    why="export adds no robustness: what seems to is a gradient that misleads, or a weaker attack",
    advice="validate with the settings of the export, or export again; see where the attack graph loses the gradient",
)
def check_reach(reach: Reach, n: int) -> Seen:
    """Check that the artefact survives the attacks no better than the reference, each of them and all together.

    A reference that has not met an attack proves nothing about it; without any reference, floors decide.
    """
    if not reach.reference:
        return Seen([], "no reference answered these images: the gate's floors alone decide", not_compared=True)
    if reach.contradictions:
        return Seen([f"the reference's worst case holds {reach.contradictions} images that its own attacks broke"], "")
    if reach.missing:
        return Seen([f"the reference holds no verdicts under {', '.join(reach.missing)} with these settings"], "")
    if reach.flips is None:
        return Seen(["the reference met none of these attacks"], "")
    worse, better = reach.flips.newly_wrong, reach.flips.newly_right
    p = binomial_tail(better, worse + better)
    saw = f"in the worst case {better} of {n} images newly right, {worse} newly wrong (p = {p:.2g})"
    if reach.alone:
        saw += f"; only the artefact met {', '.join(reach.alone)}"
    least = reach.allowed * n + 1e-9
    faults = [saw] if better - worse > least and p < ORDER_P else []
    for name, flips in reach.each.items():
        worse, better = flips.newly_wrong, flips.newly_right
        if better - worse > least and binomial_tail(better, worse + better) < EDITED_P:
            faults.append(f"under {name} {better} of {n} images newly right, {worse} newly wrong")
    return Seen(faults, saw)
