"""What a table's results files hold, row by row, and how rows compare."""

from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from result import Result, read_result
from table import Table

from mpdsgr_deploy.attacks.suite import STRONG as STRONG_PGD
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import Published, find_recipe, published
from mpdsgr_deploy.validation.report import Curve
from mpdsgr_deploy.validation.rows import Score
from mpdsgr_deploy.validation.statistics import Z95, wilson

SHOWN = {"clean": "clean", "gaussian": "gaussian", "FGSM": "fgsm", "PGD": "pgd", "BIM": "bim"}  # heading -> condition
STRONG = {"strong": "pgd-strong", "union": "worst"}
Measured = dict[str, list[Result]]  # row -> its results, one a seed; a row that was not measured is not in it
Bools = NDArray[np.bool_]


def load_results(table: Table, folder: Path) -> Measured:
    """The results of every row with all seeds there are. One measured with another recipe is left out, and logged."""
    measured: Measured = {}
    for row in table.rows:
        for path in sorted(folder.glob(f"{row.title}-seed*.json")):
            try:
                result = read_result(path, table)
            except InputError as error:
                log.warning("left out: %s", error)
                continue
            measured.setdefault(row.title, []).append(result)
    return measured


class Cell(NamedTuple):
    """Accuracy of one row under one condition in %: mean over seeds, deviation between them, interval over images."""

    mean: float
    deviation: float | None
    interval: tuple[float, float]

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread} [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"


def cell(results: list[Result], condition: str) -> Cell | None:
    """What a row's seeds measured under a condition; None if one of them did not."""
    rows = [row for result in results for row in result.evaluation.rows if row.name == condition]
    if len(rows) != len(results):
        return None
    n = rows[0].n
    mean = fmean(row.score.accuracy for row in rows)
    deviation = 100 * stdev(row.score.accuracy for row in rows) if len(rows) > 1 else None
    low, high = wilson(mean * n, n)
    return Cell(100 * mean, deviation, (100 * low, 100 * high))


def figures(table: Table, title: str) -> Published | None:
    """What was published for a row's recipe; None if this table gives it other data or another network."""
    path = find_recipe(table.row(title).recipe)
    own, used = load_recipe(path), load_recipe(path, table.overrides(table.row(title)))
    network = {"model", "neuron", "encoding"}
    same = own.data.name == used.data.name and own.model_dump(include=network) == used.model_dump(include=network)
    return published(path) if same else None


def defences(result: Result) -> list[str]:
    """Names of what a row was trained with."""
    return list(result.recipe.defence)


def groups(measured: Measured) -> dict[str, Measured]:
    """The rows without and with adversarial training; a group without rows is not there."""
    found = {
        title: {row: results for row, results in measured.items() if ("at" in defences(results[0])) == adversarial}
        for title, adversarial in (("without adversarial training", False), ("with adversarial training", True))
    }
    return {title: rows for title, rows in found.items() if rows}


def baseline(measured: Measured, results: list[Result]) -> list[Result] | None:
    """The row that the defences of `results` are held against: nothing, or AT alone for what trains with it too."""
    wanted = ["at"] if "at" in defences(results[0]) else []
    found = [other for other in measured.values() if defences(other[0]) == wanted]
    return found[0] if found and found[0] is not results else None


def grown(results: list[Result]) -> list[Curve]:
    """The curves of the strong PGD, one a seed."""
    return [c for r in results for c in next(iter(r.artefacts.values())).curves if c.attack == STRONG_PGD]


def by_eps(results: list[Result]) -> dict[float, float]:
    """Accuracy in % by eps, means over seeds, as far as four times the eps of the recipe."""
    curves, most = grown(results), 4.001 * results[0].recipe.attack.eps
    points = zip(*(curve.points for curve in curves), strict=True)
    return {p[0].eps: 100 * fmean(point.correct / point.n for point in p) for p in points if p[0].eps <= most}


class Difference(NamedTuple):
    """Points of accuracy that a row has more than another on the same images and seeds.

    mean over the seeds both have, with a 95 % interval for the choice of images; None if neither gets any image right,
    which says nothing of the images not tried. seeds: the difference of each.
    """

    mean: float
    interval: tuple[float, float] | None
    seeds: list[float]

    def __str__(self) -> str:
        if self.interval is None:
            return "none right"
        return f"{self.mean:+.1f} [{self.interval[0]:+.1f}, {self.interval[1]:+.1f}]"


def difference(results: list[Result], others: list[Result], condition: str) -> Difference:
    """`results` minus `others` under a condition; normal approximation over images, each averaged over its seeds."""
    gained, any_right = paired(results, others, condition)
    each = gained.mean(0)
    half = Z95 * each.std(ddof=1) / len(each) ** 0.5
    mean = float(each.mean())
    return Difference(mean, (mean - half, mean + half) if any_right else None, [float(row.mean()) for row in gained])


def paired(results: list[Result], others: list[Result], condition: str) -> tuple[NDArray[np.float64], bool]:
    """Points that `results` have more than `others` on each image with each seed both have, [seeds, n] in -100, 0, 100.

    And whether either gets any image right: if not, they say nothing of the images not tried.
    """
    ours, theirs = ({r.seed: score(r, condition).verdicts(count(r)) for r in rows} for rows in (results, others))
    common = sorted(ours.keys() & theirs.keys())
    gained = 100 * np.array([ours[seed].astype(float) - theirs[seed] for seed in common])
    return gained, any(ours[seed].any() or theirs[seed].any() for seed in common)


def score(result: Result, condition: str) -> Score:
    """A result's score under a condition it has."""
    return next(row.score for row in result.evaluation.rows if row.name == condition)


def count(result: Result) -> int:
    """How many images it was evaluated on."""
    return result.evaluation.rows[0].n


def omega(results: list[Result]) -> float:
    """Omega of the trained networks in [0, 1], of the potentials' own moments; mean over layers and seeds."""
    return fmean(fmean(layer["omega_empirical"] for layer in result.layers) for result in results)
