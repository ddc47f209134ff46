"""Health checks: is the evaluation itself believable? One that failed makes the verdict invalid, never a pass.

The numbers are those of the project's evaluation rules: 1 the images obey the attack's rules, 2 stronger attacks do not
leave more accuracy, 3 another network's gradient serves an attacker no better, 7 gradients exist, 8 the artefact is a
function, 9 something was compared.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Array, Differentiable, Gradient, Predictor
from mpdsgr_deploy.validation.conditions import BY_STRENGTH, Condition
from mpdsgr_deploy.validation.statistics import binomial_tail

EPS_SLACK = 1e-6  # float32 rounding of x + eps
ORDER_P = 0.01  # a stronger attack may leave more accuracy by chance, not beyond this p-value
MAX_ZERO_GRADIENTS = 0.05  # share of gradient evaluations that may vanish altogether
PROBE = 32  # images the artefact is asked about repeatedly


class Check(BaseModel):
    """One health check: what it saw, why it matters, and what to do if it failed."""

    number: int
    name: str
    passed: bool
    saw: str
    why: str = ""
    advice: str


class GradientMonitor:
    """A Differentiable that passes everything through and counts gradients that are useless to an attack."""

    def __init__(self, target: Differentiable) -> None:
        self._target = target
        self.samples = self.zero = self.non_finite = 0

    def __call__(self, x: Array, y: Array) -> Gradient:
        found = self._target(x, y)
        flat = np.asarray(found.gradient).reshape(len(x), -1)
        self.samples += len(flat)
        self.zero += int((flat == 0).all(axis=1).sum())
        self.non_finite += int((~np.isfinite(flat)).any(axis=1).sum())
        return found


def budget_faults(clean: NDArray[np.float32], attacked: Condition) -> list[str]:
    """What is wrong with attacked images: not finite, outside [0, 1], or further than eps from the clean ones."""
    name, _, eps, images = attacked
    if not np.isfinite(images).all():
        return [f"{name} has non-finite pixels"]
    if images.min() < 0 or images.max() > 1:
        return [f"{name} leaves [0, 1]"]
    if eps is not None and (moved := float(np.abs(images - clean).max())) > eps + EPS_SLACK:
        return [f"{name} moves a pixel by {moved:.6g}, more than eps {eps:.6g}"]
    return []


def attack_checks(
    faults: list[str], rule: str, correct: Mapping[str, NDArray[np.bool_]], monitor: GradientMonitor, n: int
) -> list[Check]:
    """The checks that need no artefact: 1, 2, 3 where images of another network were tried, 7 and 9.

    correct: the attacked network's verdicts [N] under each condition within eps.
    """
    return [
        check_budget(faults, rule),
        check_order(correct),
        *([check_transfer(correct)] if "transfer" in correct else []),
        check_gradients(monitor),
        check_compared(n),
    ]


def check_budget(faults: list[str], rule: str) -> Check:
    """Check 1: the attacked images obey the attack's rules, and it is stated which images they are."""
    return Check(
        number=1,
        name="attacked images obey the rules",
        passed=not faults,
        saw="; ".join(faults) or f"{rule}: attacked pixels finite, in [0, 1] and within eps",
        advice="an attack that cheats proves nothing; report this as a bug of the attack",
    )


def check_order(correct: Mapping[str, NDArray[np.bool_]]) -> Check:
    """Check 2: on the attacked network, accuracy under noise >= FGSM >= PGD >= strong PGD, up to chance."""
    advice = "the gradient misleads the attack (masked gradients): attack with other surrogates before believing it"
    return _ordered(2, "stronger attacks break more", correct, BY_STRENGTH, advice)


def check_transfer(correct: Mapping[str, NDArray[np.bool_]]) -> Check:
    """Check 3: images made on another network do not break more than those made on this one, up to chance."""
    advice = "the network's own gradient is worse than another network's: it is masked; attack with other surrogates"
    return _ordered(3, "black-box does not beat white-box", correct, ("transfer", "pgd-strong"), advice)


def _ordered(
    number: int, name: str, correct: Mapping[str, NDArray[np.bool_]], attacks: Sequence[str], advice: str
) -> Check:
    """Passes unless one of `attacks`, weakest first, breaks more images than its successor, beyond chance."""
    faults = []
    for weaker, stronger in pairwise(attacks):
        only_weaker_breaks = int((~correct[weaker] & correct[stronger]).sum())
        only_stronger_breaks = int((correct[weaker] & ~correct[stronger]).sum())
        p = binomial_tail(only_weaker_breaks, only_weaker_breaks + only_stronger_breaks)
        if only_weaker_breaks > only_stronger_breaks and p < ORDER_P:
            faults.append(f"{weaker} breaks {only_weaker_breaks} images that {stronger} does not (p = {p:.2g})")
    shares = [f"{attack} {100 * correct[attack].mean():.1f} %" for attack in attacks]
    saw = "; ".join(faults) or " >= ".join(shares)
    return Check(number=number, name=name, passed=not faults, saw=saw, advice=advice)


def check_gradients(monitor: GradientMonitor) -> Check:
    """Check 7: gradients are finite and rarely vanish."""
    share = monitor.zero / monitor.samples if monitor.samples else 1.0
    return Check(
        number=7,
        name="gradients exist",
        passed=monitor.non_finite == 0 and share <= MAX_ZERO_GRADIENTS,
        saw=f"of {monitor.samples} sample gradients {100 * share:.2f} % were zero, {monitor.non_finite} not finite",
        advice="an attack without gradients is no attack: use a wider surrogate for attacking",
    )


def check_function(artefact: Predictor, fresh: Predictor, x: NDArray[np.float32]) -> Check:
    """Check 8: the artefact answers the same again, in another batch split, and in a fresh process."""
    probe, other = x[:PROBE], x[-PROBE:]
    first = artefact(probe)
    artefact(other)
    half = (len(probe) + 1) // 2
    pieces = [artefact(piece) for piece in (probe[:half], probe[half:]) if len(piece)]
    faults = []
    for how, answer in (("asked again", artefact), ("in a fresh process", fresh)):
        try:
            parity = compare(first, answer(probe))
        except subprocess.CalledProcessError as error:
            faults.append(f"{how}: it failed: {error.stderr.decode(errors='replace').strip()[-200:]}")
            continue
        if parity.within_tolerance < parity.rows:  # the same kernels on the same batch: every row must agree
            faults.append(f"{how}: {parity}")
    split = compare(first, np.concatenate(pieces))
    if not split.holds:
        faults.append(f"in two batches: {split}")
    return Check(
        number=8,
        name="the artefact is a function of its input",
        passed=not faults,
        saw="; ".join(faults) or f"{len(probe)} images again, in two batches and in a fresh process: same answers",
        advice="state leaks between batches or the backend is not deterministic; export again, or use another backend",
    )


def check_compared(n: int) -> Check:
    """Check 9: at least one image was compared."""
    return Check(
        number=9,
        name="something was compared",
        passed=n > 0,
        saw=f"{n} images",
        advice="give a data set with test images, and a --limit above zero",
    )


def fresh_process(bundle: Path, backend: str, precision: str) -> Predictor:
    """A Predictor that answers each batch from a new `mpdsgr predict` process."""

    def answer(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory() as folder:
            images, out = Path(folder) / "images.npy", Path(folder) / "logits.npz"
            np.save(images, x)
            command = [sys.executable, "-m", "mpdsgr_deploy", "predict", str(bundle), str(images), "--out", str(out)]
            options = ["--backend", backend, "--precision", precision]
            subprocess.run([*command, *options], check=True, capture_output=True, stdin=subprocess.DEVNULL)
            with np.load(out) as arrays:
                return arrays["logits"]

    return answer
