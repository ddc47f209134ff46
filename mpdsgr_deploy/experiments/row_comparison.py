"""Compare the rows of a table: accuracies over seeds, and differences between rows, paired by seed and image."""

from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from mpdsgr_deploy.attacks.condition import BIM, CLEAN, FGSM, GAUSSIAN, PGD, WORST
from mpdsgr_deploy.attacks.condition import STRONG as STRONG_PGD
from mpdsgr_deploy.defences import DEFENCES
from mpdsgr_deploy.experiments.records import Measured, Record
from mpdsgr_deploy.experiments.table import TableSpec
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import Published, find_recipe, published
from mpdsgr_deploy.validation.proportions import Z95, wilson

SHOWN = {"clean": CLEAN, "gaussian": GAUSSIAN, "FGSM": FGSM, "PGD": PGD, "BIM": BIM}  # heading -> condition
STRONG = {"strong": STRONG_PGD, "union": WORST}


class Cell(NamedTuple):
    """The accuracy of a row under a condition, in %.

    mean: over seeds. deviation: the standard deviation between seeds, None for one seed. interval: the 95 % Wilson
    interval of the mean, for the choice of images.
    """

    mean: float
    deviation: float | None
    interval: tuple[float, float]

    @property
    def short(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"

    def __str__(self) -> str:
        return f"{self.short} [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"


def cell(records: list[Record], condition: str) -> Cell | None:
    """Return a row's accuracy under a condition over its seeds; None if a record lacks the condition."""
    if not all(condition in record.attacked.conditions for record in records):
        return None
    n = records[0].attacked.n
    accuracies = [record.attacked.accuracy(condition) for record in records]
    mean = fmean(accuracies)
    low, high = wilson(mean * n, n)
    return Cell(100 * mean, 100 * stdev(accuracies) if len(records) > 1 else None, (100 * low, 100 * high))


def validation_accuracy(records: list[Record]) -> float:
    """Return accuracy on clean validation images after the last epoch, in %, averaged over seeds."""
    return 100 * sum(record.curve["validation_accuracy"][-1] for record in records) / len(records)


def shorts(records: list[Record], conditions: dict[str, str]) -> list[str]:
    """Return the accuracies under conditions as text, without intervals; "-" for those that were not measured.

    conditions: names of conditions by heading.
    """
    return [accuracy.short if (accuracy := cell(records, condition)) else "-" for condition in conditions.values()]


def published_figures(table: TableSpec, title: str) -> Published | None:
    """Return the figures published for a row's recipe; None without any, and if the table changes data or network."""
    path = find_recipe(table.row(title).recipe)
    original, used = load_recipe(path), load_recipe(path, table.overrides(table.row(title)))
    compared: Any = {"data": {"name"}, "model": True, "neuron": True, "encoding": True}
    same = original.model_dump(include=compared) == used.model_dump(include=compared)
    return published(path) if same else None


def defences(record: Record) -> list[str]:
    return list(record.recipe.defence)


def adversarial(record: Record) -> list[str]:
    """Return the names of a row's defences that train on attacked images."""
    kinds = ((name, DEFENCES.get(name)) for name in record.recipe.defence)
    return [name for name, kind in kinds if kind is not None and kind.adversarial]


def groups(measured: Measured) -> dict[str, Measured]:
    """Return the rows without and those with adversarial training, by a title; an empty group is left out."""
    split = {
        title: {row: records for row, records in measured.items() if bool(adversarial(records[0])) == attacked}
        for title, attacked in (("without adversarial training", False), ("with adversarial training", True))
    }
    return {title: rows for title, rows in split.items() if rows}


def baseline(measured: Measured, records: list[Record]) -> list[Record] | None:
    """Return the row to compare `records` with: that with its adversarial training alone, or without any defence.

    None if there is no such row, or if it is `records`.
    """
    expected = adversarial(records[0])
    candidates = [other for other in measured.values() if defences(other[0]) == expected]
    return candidates[0] if candidates and candidates[0] is not records else None


def strong_curves(records: list[Record]) -> list[list[tuple[float, int, int]]]:
    """Return the curves under the strong PGD as in `AttackedExport.curves`, one per seed that has one."""
    curves = (next(iter(record.artefacts.values())).curves for record in records if record.artefacts)
    return [by_attack[STRONG_PGD] for by_attack in curves if STRONG_PGD in by_attack]


def by_eps(records: list[Record]) -> dict[float, float]:
    """Return accuracy in % under the strong PGD by eps, averaged over seeds, up to four times the recipe's eps."""
    curves, largest = strong_curves(records), 4.001 * records[0].recipe.attack.eps
    points = zip(*curves, strict=True)
    return {p[0][0]: 100 * fmean(correct / n for _, correct, n in p) for p in points if p[0][0] <= largest}


class Difference(NamedTuple):
    """The difference in accuracy between two rows, in percentage points: the mean, and a 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(records: list[Record], others: list[Record], condition: str) -> Difference | None:
    """Return `records` minus `others` under a condition, on the same images and seeds.

    The interval is for the choice of images, each averaged over seeds. None if neither row gets any image right, which
    says nothing about other images.
    """
    gained, any_right = paired(records, others, condition)
    return estimated(gained.mean(0, keepdims=True)) if any_right else None


def estimated(gained: NDArray[np.float64]) -> Difference:
    """Return mean and 95 % interval of the points gained [seeds, n].

    The half-width is the root of the sum of two squares: the quantile of Student's t times the standard error over
    seeds, and 1.96 times the standard error over images, each image averaged over seeds. With one seed the first is
    left out.
    """
    seeds, images = gained.shape
    square = (Z95 * gained.mean(0).std(ddof=1)) ** 2 / images
    if seeds > 1:
        quantile = round(float(student.ppf(0.975, seeds - 1)), 3)  # so that published intervals do not change
        square += (quantile * gained.mean(1).std(ddof=1)) ** 2 / seeds
    mean, half = float(gained.mean()), float(square**0.5)
    return Difference(mean, mean - half, mean + half)


def paired(records: list[Record], others: list[Record], condition: str) -> tuple[NDArray[np.float64], bool]:
    """Return `records` minus `others` by common seed and image, [seeds, n] of -100, 0 or 100.

    The second result is whether either gets any image right.
    """
    ours, theirs = ({r.seed: r.attacked.verdicts(condition) for r in rows} for rows in (records, others))
    common = sorted(ours.keys() & theirs.keys())
    gained = 100 * np.array([ours[seed].astype(float) - theirs[seed] for seed in common])
    return gained, any(ours[seed].any() or theirs[seed].any() for seed in common)


def omega(records: list[Record]) -> float:
    """Return Omega in [0, 1] by empirical moments, averaged over layers and seeds."""
    return fmean(fmean(layer["omega_empirical"] for layer in record.layers) for record in records)
