"""What a method changes against its baseline in one setting: points of accuracy, with an interval, and a verdict."""

from statistics import fmean
from typing import NamedTuple

import numpy as np
from measured import count, score
from result import Result

from mpdsgr_deploy.attacks.suite import PGD, WORST
from mpdsgr_deploy.validation.statistics import Z95

# 97.5 % quantiles of Student's t by degrees of freedom; beyond 9 the last is an upper bound
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
HELPS, MASKS, HURTS, OPEN = "helps", "masks", "hurts", "undecided"


class Effect(NamedTuple):
    """Points that a method has more than its baseline: mean over seeds, and a 95 % interval for seeds and images."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def effect(results: list[Result], baseline: list[Result], condition: str) -> Effect | None:
    """`results` minus `baseline`, paired by seed and image; None without a seed in common or the condition.

    The half-width is the root of two squares: Student's t times the standard error over seeds, and 1.96 times that over
    images, each averaged over its seeds. With one seed it is that of the images alone.
    """
    ours, theirs = ({r.seed: right(r, condition) for r in rows} for rows in (results, baseline))
    common = sorted(ours.keys() & theirs.keys())
    if not common or any(found[seed] is None for found in (ours, theirs) for seed in common):
        return None
    gained = 100 * np.array([ours[seed] - theirs[seed] for seed in common])  # [seeds, n]
    seeds, images = gained.shape
    square = (Z95 * gained.mean(0).std(ddof=1)) ** 2 / images
    if seeds > 1:
        square += (STUDENT.get(seeds - 1, STUDENT[9]) * gained.mean(1).std(ddof=1)) ** 2 / seeds
    mean, half = float(gained.mean()), float(square**0.5)
    return Effect(mean, mean - half, mean + half)


def right(result: Result, condition: str) -> np.ndarray | None:
    """1.0 for each image that is classified right under a condition, else 0.0; None if it was not measured."""
    if condition not in {row.name for row in result.evaluation.rows}:
        return None
    return score(result, condition).verdicts(count(result)).astype(float)


def verdict(results: list[Result], baseline: list[Result]) -> str:
    """What the intervals say.

    helps: more images survive every attack. hurts: fewer do. masks: no more do, and more survive PGD in the paper's
    setting. undecided: none of these.
    """
    union, paper = (effect(results, baseline, condition) for condition in (WORST, PGD))
    if union is None or paper is None:
        return OPEN
    if union.low > 0:
        return HELPS
    if union.high < 0:
        return HURTS
    return MASKS if paper.low > 0 >= union.mean else OPEN


def drops(results: list[Result]) -> dict[str, float]:
    """Mean over seeds of what a perturbation promises and does to the margin, in margins; see `sensitivity`."""
    found = [result.sensitivity for result in results if result.sensitivity["n"]]
    kinds = ("promised", "noise", "pgd")
    return {kind: fmean(f[kind] / f["margin"] for f in found) for kind in kinds} if found else {}
