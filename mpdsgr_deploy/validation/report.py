"""The report: one record, written as report.json, junit.xml, summary.md, badge.json and, for people, report.html."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import claim_directory, write_atomic
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation.health import Check
from mpdsgr_deploy.validation.rows import Flips, Row, Score

REPORT, PAGE, SUMMARY = "report.json", "report.html", "summary.md"
PROGRESS = ".progress"  # finished batches of a validation under way
Verdict = Literal["pass", "fail", "invalid"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "invalid": 3}
MEANING: dict[Verdict, str] = {
    "pass": "the artefact keeps its accuracy, clean and attacked, within the gate's rules",
    "fail": "the artefact breaks a rule of the gate",
    "invalid": "a health check failed, so this evaluation proves nothing, neither good nor bad",
}
GATE_ADVICE = (
    "find the condition in the table; clean images newly wrong: export again, in a finer precision or with --max-drop; "
    "attacked accuracy too low: train with a stronger defence; too few images: give more; or change the gate, knowingly"
)
OF_A_CHECK = "check "  # how a reason begins that a health check gave


class Point(BaseModel):
    """Correct images of n under one attack of strength eps."""

    eps: float
    correct: int
    n: int


class Curve(BaseModel):
    """One attack at several eps."""

    attack: str
    points: list[Point]


class Example(BaseModel):
    """One broken image: its number, its label, what was predicted for it clean and attacked.

    pictures: PNG files in base64: clean, attacked, and the difference, magnified, grey where nothing changed.
    """

    image: int
    label: str
    clean: str
    attacked: str
    attack: str
    pictures: tuple[str, str, str]


class VariantFlips(BaseModel):
    """One of the bundle's precisions against its fp32 network on the same n images, clean and attacked."""

    precision: str
    n: int
    clean: Flips
    attacked: Flips


class Report(BaseModel):
    """Everything a verdict rests on. `images` states which images were used and by which rule.

    seconds: how long it took; stopped: why it ended before all conditions were tried; None: it did not.
    """

    schema_version: int = 3
    verdict: Verdict
    reasons: list[str]
    bundle: str
    network: str
    artefact_file: str
    artefact_sha256: str
    attack_sha256: str | None = None
    backend: str
    precision: str
    tier: str
    images: str
    images_sha256: str
    seed: int
    rows: list[Row]
    curves: list[Curve] = []
    examples: list[Example] = []
    variants: list[VariantFlips] = []
    parity: Parity | None
    health: list[Check]
    gate: Gate
    stopped: str | None = None
    seconds: float
    provenance: dict[str, Any]

    def row(self, name: str) -> Row | None:
        """The condition of that name, if it was tried."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def eps(self) -> float | None:
        """The strength of the evaluated attacks: that of the worst case."""
        worst = self.row("worst")
        return worst.eps if worst else max((row.eps for row in self.rows if row.eps is not None), default=None)


class Finding(NamedTuple):
    """What is wrong, a line for each fault, and what to do about it."""

    what: list[str]
    advice: str


def findings(report: Report) -> Iterator[Finding]:
    """Failed health checks, then the gate's complaints."""
    for check in report.health:
        if not check.passed:
            yield Finding([f"check {check.number}, {check.name}: {check.saw}"], check.advice)
    if reasons := gate_reasons(report):
        yield Finding(reasons, GATE_ADVICE)


def gate_reasons(report: Report) -> list[str]:
    """The reasons that no health check gave. That of a condition begins with its name and a colon."""
    return [reason for reason in report.reasons if not reason.startswith(OF_A_CHECK)]


def percent(score: Score) -> str:
    """Accuracy and interval in %, for people."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def claim_report(directory: Path) -> None:
    """Fail early, before hours of attacks: the directory is usable. Raises InputError if it is somebody else's."""
    claim_directory(directory, REPORT, "report", partial=PROGRESS)


def write_report(report: Report, directory: Path) -> Path:
    """Write all files into `directory` and return the one to read: report.html, or summary.md without jinja2.

    report.json comes last, since it marks the directory as complete.
    """
    from mpdsgr_deploy.validation import summary  # it reads this module

    write_atomic(directory / SUMMARY, summary.summary(report).encode())
    write_atomic(directory / "junit.xml", summary.junit(report))
    write_atomic(directory / "badge.json", summary.badge(report))
    best = directory / SUMMARY
    if drawable():
        from mpdsgr_deploy.validation.page import page

        best = directory / PAGE
        write_atomic(best, page(report).encode())
    else:
        (directory / PAGE).unlink(missing_ok=True)  # of an earlier run: it would contradict the others
    write_atomic(directory / REPORT, report.model_dump_json(indent=1).encode())
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    return best


def drawable() -> bool:
    """Is what the page needs installed? Everything else is written without it."""
    try:
        need("jinja2", "report")
        need("matplotlib", "report")
    except InputError:
        log.warning("no report.html: it takes jinja2 and matplotlib; pip install 'mpdsgr-deploy[report]' brings them")
        return False
    return True
