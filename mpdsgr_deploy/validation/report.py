"""The report of a validation: the record from which `writing` makes all files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel

from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.diagnostics.operation_counts import macs, parameters
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.schema import read_document
from mpdsgr_deploy.validation.health.check_registry import Check
from mpdsgr_deploy.validation.rows import EarlyStop, Reason, Row, Score, VerdictFlips
from mpdsgr_deploy.validation.rules import Rule

REPORT, PAGE, SUMMARY = "report.json", "report.html", "summary.md"
PROGRESS = ".progress"  # directory of finished batches while a validation runs
Verdict = Literal["pass", "fail", "invalid"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "invalid": 3}
MEANING: dict[Verdict, str] = {
    "pass": "the artefact's accuracy, clean and under attack, is within the gate's rules",
    "fail": "the artefact breaks a rule of the gate",
    "invalid": "a health check failed, so this evaluation says nothing about the artefact",
}
GATE_ADVICE = (
    "find the condition in the table; if clean images are newly wrong, export again in a finer precision or with "
    "--max-drop; if the accuracy under attack is too low, train with a stronger defence; if there are too few "
    "images, use more; change the gate only if its rules are wrong"
)
NOT_COMPARED = "not compared"


class Point(BaseModel):
    """The number of correct images of n under one attack of strength eps."""

    eps: float
    correct: int
    n: int


class Curve(BaseModel):
    """The accuracy under one attack at several eps."""

    attack: str
    points: list[Point]

    @classmethod
    def of(cls, attack: str, verdicts: Mapping[float, NDArray[np.bool_]]) -> "Curve":
        points = [Point(eps=eps, correct=int(right.sum()), n=len(right)) for eps, right in sorted(verdicts.items())]
        return cls(attack=attack, points=points)


class Example(BaseModel):
    """One image that an attack broke.

    image: its place among the images. label: the true class; clean, attacked: the classes predicted without and under
    attack. pictures: PNG files in base64 of the clean image, the attacked image, and their magnified difference, which
    is grey where nothing changed.
    """

    image: int
    label: str
    clean: str
    attacked: str
    attack: str
    pictures: tuple[str, str, str]


class VariantFlips(BaseModel):
    """One of the bundle's precisions compared with fp32 on the same n images, clean and attacked."""

    precision: str
    n: int
    clean: VerdictFlips
    attacked: VerdictFlips


class ModelFacts(BaseModel):
    """A network's architecture, training method, time steps T, parameters, and multiply-accumulates per image."""

    architecture: str
    method: str
    steps: int
    parameters: int
    macs: int

    @classmethod
    def of(cls, bundle: Bundle, precision: str) -> "ModelFacts":
        """Return the facts about a precision. Raises InputError as `Bundle.variant` does."""
        recipe, network = bundle.manifest.recipe, onnx.load(bundle.variant(precision))
        return cls(
            architecture=f"{recipe.model.name}, width {recipe.model.width:g}",
            method=recipe.method,
            steps=recipe.encoding.T,
            parameters=parameters(network),
            macs=macs(network, recipe.encoding.T).exported,
        )


class Report(BaseModel):
    """A verdict and everything that it rests on.

    bundle_sha256: the digest of the bundle's manifest. signer: who signed the bundle, if a signature was required.
    model: facts about the network. suite: version of the tier's attacks. images: a phrase that says which images were
    used and how they were chosen. parity: the clean logits compared with the reference's. gate, rules: what the
    artefact had to keep, and who set each rule. stopped: why the evaluation ended early, which makes the accuracy under
    all attacks an upper bound. remarks: further information on that accuracy. seconds: the duration.
    bundle_sha256 and model are None, and suite is 1, in reports of versions that did not record them.
    """

    schema_version: int = 3
    verdict: Verdict
    reasons: list[Reason]
    bundle: str
    bundle_sha256: str | None = None
    signer: str | None = None
    network: str
    model: ModelFacts | None = None
    artefact_file: str
    artefact_sha256: str
    backend: str
    precision: str
    tier: str
    suite: int = 1
    images: str
    images_sha256: str
    seed: int
    rows: list[Row]
    curves: list[Curve] = []
    examples: list[Example] = []
    variants: list[VariantFlips] = []
    parity: Parity | None
    health: list[Check]
    remarks: list[str] = []
    gate: Gate
    rules: list[Rule] = []
    stopped: EarlyStop | None = None
    seconds: float
    provenance: dict[str, Any]

    def row(self, name: str) -> Row | None:
        """Return the row of a condition; None if it was not evaluated."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def eps(self) -> float | None:
        """The L-infinity bound of the worst case; without that row, the largest of any condition."""
        worst = self.row(WORST)
        return worst.eps if worst else max((row.eps for row in self.rows if row.eps is not None), default=None)


def load_report(path: Path) -> Report:
    """Load a report from its file, or from the directory that `mpdsgr validate` wrote.

    Raises InputError if it is missing, damaged, or of a later version.
    """
    file = path / REPORT if path.is_dir() else path
    return read_document(file, Report, otherwise="give a report of `mpdsgr validate`")


class Finding(NamedTuple):
    """Faults of the artefact or of the evaluation, one phrase for each, and what to do about them."""

    what: list[str]
    advice: str


def findings(report: Report) -> Iterator[Finding]:
    """Yield a finding for each failed health check, then one for the gate's reasons."""
    for check in report.health:
        if check.failed:
            yield Finding([f"check {check.number}, {check.name}: {check.saw}"], check.advice)
    if reasons := gate_reasons(report):
        yield Finding([reason.line for reason in reasons], GATE_ADVICE)


def gate_reasons(report: Report) -> list[Reason]:
    """Return the gate's own reasons, without those that repeat a failed health check."""
    return [reason for reason in report.reasons if reason.check is None]


def not_compared(report: Report) -> list[str]:
    """Return the names of conditions that lack a reference although other conditions have one.

    Transferred attacks, which never have a reference, and the worst case are left out.
    """
    if not any(row.reference for row in report.rows):
        return []
    return [row.name for row in report.rows if row.reference is None and row.name != WORST and row.comparable]


def headline_first(report: Report) -> list[Row]:
    """Sort the rows in reading order: the accuracy under all attacks before the single conditions."""
    return sorted(report.rows, key=lambda row: row.name != WORST)


def sensitivity(report: Report) -> str:
    """Return a clause on the smallest drops that this run could detect, or "" if nothing was compared."""
    named = [(row.name, row.detectable) for row in report.rows if row.name in (CLEAN, WORST)]
    drops = [f"{100 * drop:.1f} % ({name})" for name, drop in named if drop is not None]
    return (
        f"with a probability of 90 % the gate would have refused a true drop of {', of '.join(drops)}" if drops else ""
    )


def percent(score: Score) -> str:
    """Format an accuracy and its 95 % interval in %."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def accuracy_text(row: Row, stopped: EarlyStop | None = None) -> str:
    """Format a row's accuracy with its interval, or as an upper bound if attacks or images are missing."""
    if not row.at_most:
        return percent(row.artefact)
    moment = f", {stopped.moment}" if stopped and row.name == WORST else f", of {row.n} images attacked"
    return f"at most {100 * row.artefact.accuracy:.1f}{moment}"
