"""What a method changes against its baseline in one setting: points of accuracy, with an interval, and a verdict."""

from typing import NamedTuple

import numpy as np
from measured import omega, paired
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

    None too where neither gets an image right. The half-width is the root of two squares: Student's t times the
    standard error over seeds, and 1.96 times that over images, each averaged over its seeds. With one seed it is that
    of the images alone.
    """
    if not common_seeds(results, baseline) or not all(has(result, condition) for result in (*results, *baseline)):
        return None
    gained, any_right = paired(results, baseline, condition)
    return estimated(gained) if any_right else None


def pooled(compared: list[tuple[list[Result], list[Result]]], condition: str) -> Effect | None:
    """The mean effect of several pairs of results and baseline, over the seeds that all have; None without any."""
    seeds = set.intersection(*(set(common_seeds(*two)) for two in compared))
    if not seeds:
        return None
    few = [[[result for result in rows if result.seed in seeds] for rows in two] for two in compared]
    return estimated(np.mean([paired(results, baseline, condition)[0] for results, baseline in few], axis=0))


def common_seeds(results: list[Result], baseline: list[Result]) -> list[int]:
    """That both were measured with."""
    return sorted({result.seed for result in results} & {result.seed for result in baseline})


def has(result: Result, condition: str) -> bool:
    """Whether it was measured under a condition."""
    return any(row.name == condition for row in result.evaluation.rows)


def estimated(gained: np.ndarray) -> Effect:
    """Mean and interval of points gained [seeds, n]."""
    seeds, images = gained.shape
    square = (Z95 * gained.mean(0).std(ddof=1)) ** 2 / images
    if seeds > 1:
        square += (STUDENT.get(seeds - 1, STUDENT[9]) * gained.mean(1).std(ddof=1)) ** 2 / seeds
    mean, half = float(gained.mean()), float(square**0.5)
    return Effect(mean, mean - half, mean + half)


def verdict(results: list[Result], baseline: list[Result]) -> str:
    """What the intervals say.

    helps: more images survive every attack. hurts: fewer do. masks: no more do, more survive PGD in the paper's
    setting, and the difference between the two is no chance either. undecided: none of these, or a single seed, which
    says nothing of how seeds differ.
    """
    union, paper = (effect(results, baseline, condition) for condition in (WORST, PGD))
    if union is None or paper is None or len(common_seeds(results, baseline)) < 2:
        return OPEN
    if union.low > 0:
        return HELPS
    if union.high < 0:
        return HURTS
    lost = estimated(paired(results, baseline, PGD)[0] - paired(results, baseline, WORST)[0])
    return MASKS if union.mean <= 0 < min(paper.low, lost.low) else OPEN


def emptied(results: list[Result], baseline: list[Result]) -> float:
    """By how much Omega is lower than the baseline's, over the seeds both have."""
    common = common_seeds(results, baseline)
    ours, theirs = ([result for result in rows if result.seed in common] for rows in (results, baseline))
    return omega(theirs) - omega(ours)
