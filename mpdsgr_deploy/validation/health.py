"""Health checks: is the evaluation itself believable? One that failed makes the verdict invalid, never a pass.

1 to 9 are those of the project's evaluation rules, in their order; 10 to 13 ask whether what is evaluated is what it
says: the attack graph the network's own, the images those that were promised, the outputs logits, and the attack as
strong as that on the reference.
"""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mpdsgr_deploy.attacks.tiers import BY_STRENGTH, required_surrogates
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.validation.rows import Flips
from mpdsgr_deploy.validation.statistics import binomial_tail, exceeds

EPS_SLACK = 1e-6  # float32 rounding of x + eps
ORDER_P = 0.01  # a stronger attack may leave more accuracy by chance, not beyond this p-value
MAX_ZERO_GRADIENTS = 0.05  # share of gradient evaluations that may vanish altogether
MAX_AT_LARGE_EPS = 0.1  # accuracy that may be left where eps lets an attack paint any image
MAX_MORE_STEPS = 0.01  # share of images that twice the steps may still break, where the gate is no coarser
PROBE = 32  # images the artefact is asked about repeatedly
FEW_VALUES = 128  # distinct logits of a readout that counts spikes, at most; a linear readout has about one an image

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Verdicts = Mapping[str, Bools]


class Check(BaseModel):
    """One health check: what it saw, why that matters, and what to do if it failed."""

    number: int
    name: str
    passed: bool
    saw: str
    why: str = ""  # absent from results of earlier versions
    advice: str


def budget_faults(name: str, clean: Floats, attacked: Floats, eps: float | None) -> list[str]:
    """What is wrong with attacked images: not finite, outside [0, 1], or further than eps from the clean ones."""
    if not np.isfinite(attacked).all():
        return [f"{name} has non-finite pixels"]
    if attacked.min() < 0 or attacked.max() > 1:
        return [f"{name} leaves [0, 1]"]
    if eps is not None and (moved := float(np.abs(attacked - clean).max())) > eps + EPS_SLACK:
        return [f"{name} moves a pixel by {moved:.6g}, more than eps {eps:.6g}"]
    return []


def rounded_to_bytes(attacked: Floats) -> bool:
    """Whether every pixel lies on the 8-bit grid; random starts leave it, so such images were saved as bytes."""
    levels = attacked * 255
    return bool((np.abs(levels - np.rint(levels)) < 1e-3).all())


def check_budget(faults: Sequence[str], rule: str) -> Check:
    """Check 1: the attacked images obey the attack's rules, and it is stated which images they are."""
    return Check(
        number=1,
        name="attacked images obey the rules",
        passed=not faults,
        saw="; ".join(faults) or f"{rule}: attacked pixels finite, in [0, 1], within eps and not rounded to 8 bits",
        why="images outside the ball break any network; images rounded to bytes are weaker attacks",
        advice="an attack that cheats proves nothing; report this as a bug of the attack",
    )


def check_order(correct: Verdicts) -> Check:
    """Check 2: accuracy under noise >= FGSM >= PGD >= strong PGD >= the union of all, up to chance."""
    return Check(
        number=2,
        name="stronger attacks break more",
        **_ordered(correct, BY_STRENGTH),
        why="where one step breaks more than many, the gradient leads the attack astray: it is masked",
        advice="attack with other surrogates, and with APGD and Square, before believing any figure",
    )


def check_black_box(correct: Verdicts, black_box: Iterable[str], white_box: Iterable[str]) -> Check:
    """Check 3: attacks that see no gradient of the network break no more than those that do, up to chance."""
    blind = {name: correct[name] for name in black_box}
    union = np.logical_and.reduce([correct[name] for name in white_box])
    found = [_ordered({name: verdict, "white-box": union}, (name, "white-box")) for name, verdict in blind.items()]
    return Check(
        number=3,
        name="black-box does not beat white-box",
        passed=all(one["passed"] for one in found),
        saw="; ".join(str(one["saw"]) for one in found) or "no black-box attack was made",
        why="an attacker with the gradient can do all that one without it can; if not, the gradient is masked",
        advice="the network's own gradient serves attackers badly: attack through other surrogates and with APGD",
    )


def _ordered(correct: Verdicts, attacks: Sequence[str]) -> dict[str, Any]:
    """`passed` and `saw`: whether none of `attacks`, weakest first, breaks more than its successor, beyond chance."""
    faults = []
    for weaker, stronger in pairwise(attacks):
        only_weaker_breaks = int((~correct[weaker] & correct[stronger]).sum())
        only_stronger_breaks = int((correct[weaker] & ~correct[stronger]).sum())
        p = binomial_tail(only_weaker_breaks, only_weaker_breaks + only_stronger_breaks)
        if only_weaker_breaks > only_stronger_breaks and p < ORDER_P:
            faults.append(f"{weaker} breaks {only_weaker_breaks} images that {stronger} does not (p = {p:.2g})")
    shares = [f"{attack} {100 * correct[attack].mean():.1f} %" for attack in attacks]
    return {"passed": not faults, "saw": "; ".join(faults) or " >= ".join(shares)}


def check_growth(left: Mapping[float, Bools]) -> Check:
    """Check 4: accuracy under the strong PGD falls with eps, to nothing where any image can be painted.

    left: verdicts [m] on the same images by eps.
    """
    radii = sorted(left)
    named = {f"eps {eps:.3g}": left[eps] for eps in radii}
    order = _ordered(named, list(named))
    share = float(left[radii[-1]].mean())
    fault = f"at eps {radii[-1]:.3g} {100 * share:.1f} % are left" if share > MAX_AT_LARGE_EPS else ""
    return Check(
        number=4,
        name="accuracy falls to nothing as eps grows",
        passed=bool(order["passed"]) and not fault,
        saw="; ".join(filter(None, [fault, str(order["saw"])])),
        why="with eps 0.5 and more an image can become any other: an attack that fails there is broken",
        advice="the attack does not reach the network: look at the gradients (check 7) and at other surrogates",
    )


def check_convergence(broken: int, n: int, steps: int, allowed: float = MAX_MORE_STEPS) -> Check:
    """Check 5: twice the steps break hardly any image that survived all attacks; broken of the n images looked at.

    allowed: the share that may be left to break: what the gate lets pass in the worst case, but at least 1 %.
    """
    return Check(
        number=5,
        name="more steps do not help the attack",
        passed=exceeds(broken, n, max(allowed, MAX_MORE_STEPS)) >= ORDER_P,
        saw=f"{2 * steps} steps instead of {steps} break {broken} of {n} images more",
        why="an attack stopped early counts images as robust that it was about to break",
        advice="raise attack.strong_steps in the recipe, or validate with tier release",
    )


def check_sweep(attacked: Iterable[str | None], trained: str) -> Check:
    """Check 6: the attacker tried surrogates of other widths and shapes than the trained one, adaptive ones too.

    attacked: the surrogates through which the network was attacked.
    """
    required, tried = required_surrogates(trained), set(attacked)
    missing = [name for name in required if name not in tried]
    return Check(
        number=6,
        name="other surrogates were tried",
        passed=not missing,
        saw=f"missing: {', '.join(missing)}" if missing else f"{trained} (trained), {', '.join(required)}",
        why="the attacker chooses the surrogate, and the trained one is seldom the strongest",
        advice="use a tier as it comes; all of them sweep",
    )


def check_gradients(samples: int, zero: int, not_finite: int) -> Check:
    """Check 7: gradients through the trained surrogate rarely vanish, and none at all is not finite."""
    share = zero / samples if samples else 1.0
    return Check(
        number=7,
        name="gradients exist",
        passed=not_finite == 0 and share <= MAX_ZERO_GRADIENTS,
        saw=f"of {samples} gradients {100 * share:.2f} % were zero, {not_finite} not finite",
        why="an attack without gradients is no attack",
        advice="the trained surrogate is too narrow to attack through, or the network saturates: see the sweep",
    )


def check_function(artefact: Predictor, fresh: Predictor | None, x: Floats) -> Check:
    """Check 8: the artefact answers the same again, in another batch split and order, and in a fresh process."""
    probe, other = x[:PROBE], x[-PROBE:]
    first = artefact(probe)
    artefact(other)
    half = (len(probe) + 1) // 2
    faults = []
    for how, answer in (("asked again", artefact), *((("in a fresh process", fresh),) if fresh else ())):
        try:
            parity = compare(first, answer(probe))
        except subprocess.CalledProcessError as error:
            faults.append(f"{how}: it failed: {error.stderr.decode(errors='replace').strip()[-200:]}")
            continue
        if parity.within_tolerance < parity.rows:  # the same kernels on the same batch: every row must agree
            faults.append(f"{how}: {parity}")
    pieces = [artefact(piece) for piece in (probe[:half], probe[half:]) if len(piece)]
    for how, found in (("in two batches", np.concatenate(pieces)), ("in reverse order", artefact(probe[::-1])[::-1])):
        parity = compare(first, found)
        if not parity.holds:
            faults.append(f"{how}: {parity}")
    asked = "again, in two batches, in reverse order" + (" and in a fresh process" if fresh else "")
    return Check(
        number=8,
        name="the artefact is a function of its input",
        passed=not faults,
        saw="; ".join(faults) or f"{len(probe)} images {asked}: same answers",
        why="answers that depend on the batch, on earlier images or on chance are not those that were attacked",
        advice="state leaks between batches or the backend is not deterministic; export again, or use another backend",
    )


def check_compared(n: int, against: str = "the reference") -> Check:
    """Check 9: at least one image was compared, and with something; `against`: nothing if it is empty."""
    return Check(
        number=9,
        name="something was compared",
        passed=n > 0 and bool(against),
        saw=f"{n} images against {against or 'nothing: no reference answered them, and the gate has no floor'}",
        why="a comparison of nothing finds no difference",
        advice="give test images, and export with the data set at hand or write floors into the gate",
    )


def check_attack_graph(faults: Sequence[str]) -> Check:
    """Check 10: the attack graph is the derivative of the very network under test."""
    return Check(
        number=10,
        name="the attack graph is the network's own",
        passed=not faults,
        saw="; ".join(faults) or "derived again from the network, byte for byte the same",
        why="a gradient of something else, or none, makes any network look robust",
        advice="export again; if the bundle came from elsewhere, do not trust it",
    )


def check_images(faults: Sequence[str], rule: str) -> Check:
    """Check 11: the images are those the reference saw, in their order, and those of the data set."""
    return Check(
        number=11,
        name="the images are the promised ones",
        passed=not faults,
        saw="; ".join(faults) or rule,
        why="on chosen images any network is accurate and robust",
        advice="validate on the data set itself (--root), or export again with it at hand",
    )


def check_logits(logits: Floats) -> Check:
    """Check 12: the outputs [n, K] are logits: no probabilities, no counts of spikes."""
    sums = logits.sum(axis=1)
    faults = []
    if len(logits) and (logits >= 0).all() and np.abs(sums - 1).max() < 1e-3:
        faults.append("every row is positive and adds up to 1: probabilities")
    distinct = len(np.unique(logits.round(5)))
    if logits.size > 4 * FEW_VALUES and distinct <= FEW_VALUES:
        faults.append(f"{logits.size} outputs take {distinct} values only: counts of spikes")
    return Check(
        number=12,
        name="the outputs are logits",
        passed=not faults,
        saw="; ".join(faults) or f"{distinct} distinct values in {len(logits)} rows",
        why="a softmax saturates and counts have plateaus: gradients and queries then find nothing to follow",
        advice="export the linear readout's mean over time, before any softmax or count",
    )


def check_reach(flips: Flips | None, n: int, allowed: float) -> Check:
    """Check 13: the artefact does not withstand all attacks better than the reference; flips: of the worst case.

    None: the reference met other attacks. `allowed` is the gate's limit for a change the other way.
    """
    worse, better = (flips.newly_wrong, flips.newly_right) if flips else (0, 0)
    p = binomial_tail(better, worse + better)
    return Check(
        number=13,
        name="the attack reaches the artefact as it reached the reference",
        passed=better - worse <= allowed * n + 1e-9 or p >= ORDER_P,
        saw=f"in the worst case {better} of {n} images newly right, {worse} newly wrong (p = {p:.2g})"
        if flips
        else "the reference met other attacks",
        why="export adds no robustness: what seems to is a gradient that misleads, or a weaker attack",
        advice="compare the recipe's attack with that of the export; see where the attack graph loses the gradient",
    )
