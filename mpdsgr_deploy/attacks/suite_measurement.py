"""Measure a network under every condition of a suite, for references, tables and validation.

`measure` goes through the conditions, weak attacks first, and returns a frozen `Measurement`. Torch networks and
exported artefacts are measured in the same way.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, STRONG, WORST, Classes, Condition, Floats
from mpdsgr_deploy.attacks.resumable_run import Journal, gather, run
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.progress import log, track

Bools = NDArray[np.bool_]
EPS_SLACK = 1e-6  # tolerance for the float32 rounding of x + eps

# Called after every batch with a condition's name and its verdicts so far. Returns a reason to stop measuring, for
# example a drop that the remaining images cannot make up for, or None to continue.
Hopeless = Callable[[str, Bools], str | None]


@dataclass(frozen=True)
class Outcome:
    """The result of one condition on the first m of n images; m < n only if the measurement stopped in this condition.

    correct [m]: whether each attacked image is classified correctly. predicted [m]: the predicted classes. evaluations:
    gradients or queries for all images together; zero, not_finite: gradients that the attack could not use. faults:
    violations of the attack's rules by attacked images. images [m, C, H, W]: the attacked images of the strong PGD,
    None for other conditions. seconds: wall-clock time in this run, without that of batches finished by an earlier run.
    """

    condition: Condition
    correct: Bools
    predicted: Classes
    evaluations: int
    zero: int
    not_finite: int
    faults: tuple[str, ...]
    images: Floats | None
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """Why a measurement ended early. during: the condition in which it stopped; None: it stopped before the first."""

    during: str | None
    condition: str | None  # the verdicts that were the reason: `during`, "clean" or "worst"; None: another reason
    why: str


@dataclass(frozen=True)
class Measurement:
    """The result of `measure` on n images of classes y [n].

    clean [n]: classes predicted without attack. standing [n]: whether an image is classified correctly without attack
    and in every outcome within eps. If `stopped` is set, the attacks that are missing may break more images.
    """

    y: Classes
    clean: Classes
    outcomes: tuple[Outcome, ...]
    standing: Bools
    stopped: Stopped | None = None

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.y)

    @cached_property
    def verdicts(self) -> Mapping[str, Bools]:
        """Return verdicts [m] by condition, with "clean" first and "worst" last."""
        attacked = {outcome.condition.name: outcome.correct for outcome in self.outcomes}
        return {CLEAN: self.clean == self.y, **attacked, WORST: self.standing}

    def outcome(self, name: str) -> Outcome | None:
        """Return the outcome of the condition of that name, if it was measured."""
        return next((outcome for outcome in self.outcomes if outcome.condition.name == name), None)


def union(verdicts: Mapping[str, Bools], names: Iterable[str]) -> Bools:
    """Return which images [n] are right under all of these conditions: the worst case over them."""
    return np.logical_and.reduce([verdicts[name] for name in names])


def measure(
    suite: Suite,
    x: Floats,
    y: Classes,
    clean: Classes,
    *,
    batch_size: int,
    journal: Journal | None = None,
    hopeless: Hopeless = lambda name, correct: None,
    stopped: Stopped | None = None,
    of: str = "",
) -> Measurement:
    """Measure images x [n, C, H, W] in [0, 1] with classes y [n] under all conditions of a suite.

    clean [n]: the classes that the suite's network predicts without attack. journal: stores finished batches.
    hopeless: may stop the measurement early, see `Hopeless`. stopped: a reason to measure nothing. of: prefix of the
    names in progress bars and logs. Raises InputError if an attack does, for example for an unknown surrogate.
    """
    standing, outcomes = clean == y, list[Outcome]()
    began, spent, total = time.monotonic(), 0, sum(condition.cost + 1 for condition in suite.conditions)
    for condition in suite.conditions:
        if stopped is not None:
            break
        outcome, standing, stopped = _outcome(
            suite, condition, x, y, clean, standing, batch_size, journal, hopeless, of
        )
        outcomes.append(outcome)
        spent += condition.cost + 1
        seconds = (time.monotonic() - began) / spent * (total - spent)
        share = 100 * outcome.correct.mean()
        log.info("%-24s %5.1f %%   about %.0f s left", f"{of}{condition.name}", share, seconds)
    if stopped is not None:
        log.warning("stopped early: %s", stopped.why)
    return Measurement(y, clean, tuple(outcomes), standing, stopped)


def _outcome(
    suite: Suite,
    condition: Condition,
    x: Floats,
    y: Classes,
    clean: Classes,
    before: Bools,
    batch_size: int,
    journal: Journal | None,
    hopeless: Hopeless,
    of: str,
) -> tuple[Outcome, Bools, Stopped | None]:
    """Measure one condition, on all images unless `hopeless` stops it.

    before [n]: images that earlier conditions left correctly classified. Returns the outcome, the same images without
    those that this condition broke, and why the measurement stopped, or None.
    """
    name, standing, stopped = condition.name, before.copy(), None
    parts, faults, begun = [], list[str](), time.perf_counter()
    batches = run(suite, condition, x, y, clean, batch_size=batch_size, journal=journal)
    for part in track(batches, f"{of}{name}", -(-len(y) // batch_size)):
        parts.append(part)
        rows = part.rows
        faults += budget_faults(name, x[rows], part.attacked.images, condition.eps)
        faults += condition.faults(x[rows], part.attacked.images)
        if condition.eps is not None:
            standing[rows] &= part.predicted == y[rows]
        done = np.concatenate([p.predicted == y[p.rows] for p in parts])
        stopped = _stop(name, [(name, done), (WORST, standing)], hopeless)
        if stopped is not None:
            break
    attacked, predicted = gather(parts)
    done = predicted == y[: len(predicted)]
    images = attacked.images if name == STRONG else None
    broken = (clean == y)[: len(done)] & ~done
    if images is not None and broken.any() and rounded_to_bytes(images[broken]):
        faults.append(f"{name} left every pixel on the 8-bit grid, from random starts")
    seconds = time.perf_counter() - begun
    return Outcome(condition, done, predicted, *attacked[1:], tuple(faults), images, seconds), standing, stopped


def _stop(during: str, verdicts: Iterable[tuple[str, Bools]], hopeless: Hopeless) -> Stopped | None:
    for name, correct in verdicts:
        if why := hopeless(name, correct):
            return Stopped(during, name, why)
    return None


def budget_faults(name: str, clean: Floats, attacked: Floats, eps: float | None) -> list[str]:
    """Return the faults of attacked images: not finite, outside [0, 1], or further than eps from the clean ones."""
    if not np.isfinite(attacked).all():
        return [f"{name} has non-finite pixels"]
    if attacked.min() < 0 or attacked.max() > 1:
        return [f"{name} leaves [0, 1]"]
    if eps is not None and (change := float(np.abs(attacked - clean).max())) > eps + EPS_SLACK:
        return [f"{name} moves a pixel by {change:.6g}, more than eps {eps:.6g}"]
    return []


def rounded_to_bytes(attacked: Floats) -> bool:
    """Whether every pixel lies on the 8-bit grid; random starts leave it, so such images were saved as bytes."""
    levels = attacked * 255
    return bool((np.abs(levels - np.rint(levels)) < 1e-3).all())
