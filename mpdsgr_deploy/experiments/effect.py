"""The effect of a method: the accuracy that it gains over the baseline, with an interval and a verdict."""

from typing import NamedTuple

import numpy as np

from mpdsgr_deploy.attacks.condition import CLEAN, GAUSSIAN, PGD, SQUARE, STRONG, TRANSFER, WORST
from mpdsgr_deploy.experiments.records import Measured, Record
from mpdsgr_deploy.experiments.row_comparison import Difference, estimated, omega, paired
from mpdsgr_deploy.experiments.study import Setting, Study, StudyMethod

CONDITIONS = {
    "clean": CLEAN,
    "noise": GAUSSIAN,
    "PGD": PGD,
    "transfer": TRANSFER,
    "Square": SQUARE,
    "strong": STRONG,
    "union": WORST,
}
HELPS, MASKS, HURTS, OPEN = "helps", "masks", "hurts", "undecided"


def effect(records: list[Record], baseline: list[Record], condition: str) -> Difference | None:
    """Return what `records` gain over `baseline` under a condition, with an interval over seeds and images.

    None without a common seed, if a record lacks the condition, and if neither side gets any image right.
    """
    measured = all(condition in record.attacked.conditions for record in (*records, *baseline))
    if not measured or not common_seeds(records, baseline):
        return None
    gained, any_right = paired(records, baseline, condition)
    return estimated(gained) if any_right else None


def pooled(pairs: list[tuple[list[Record], list[Record]]], condition: str) -> Difference | None:
    """Return the mean effect over pairs of records and baseline, on the seeds that all have; None without any."""
    seeds = set.intersection(*(set(common_seeds(*pair)) for pair in pairs))
    if not seeds:
        return None
    chosen = [[[record for record in rows if record.seed in seeds] for rows in pair] for pair in pairs]
    return estimated(np.mean([paired(records, baseline, condition)[0] for records, baseline in chosen], axis=0))


def common_seeds(records: list[Record], baseline: list[Record]) -> list[int]:
    return sorted({record.seed for record in records} & {record.seed for record in baseline})


def verdict(records: list[Record], baseline: list[Record]) -> str:
    """Return the verdict that the intervals allow.

    helps: more images survive all attacks. hurts: fewer do. masks: no more survive all attacks, more survive PGD in the
    paper's setting, and the two effects differ significantly. undecided: none of these, or fewer than two common seeds,
    which do not show how seeds differ.
    """
    union, paper = (effect(records, baseline, condition) for condition in (WORST, PGD))
    if union is None or paper is None or len(common_seeds(records, baseline)) < 2:
        return OPEN
    if union.low > 0:
        return HELPS
    if union.high < 0:
        return HURTS
    lost = estimated(paired(records, baseline, PGD)[0] - paired(records, baseline, WORST)[0])
    return MASKS if union.mean <= 0 < min(paper.low, lost.low) else OPEN


def emptied(records: list[Record], baseline: list[Record]) -> float:
    """Return how much lower Omega is than the baseline's, averaged over layers and common seeds."""
    common = common_seeds(records, baseline)
    ours, theirs = ([record for record in rows if record.seed in common] for rows in (records, baseline))
    return omega(theirs) - omega(ours)


class Pair(NamedTuple):
    """A method in a setting, with its records and those of its baseline."""

    setting: Setting
    method: StudyMethod
    records: list[Record]
    baseline: list[Record]


def pairs(study: Study, measured: Measured) -> list[Pair]:
    """Return the methods of each setting that are not the baseline and were measured, as was their baseline."""
    compared = []
    for setting, method in study.pairs():
        row, baseline = study.title_of(setting, method), study.baseline_of(setting)
        if row != baseline and row in measured and baseline in measured:
            compared.append(Pair(setting, method, measured[row], measured[baseline]))
    return compared
