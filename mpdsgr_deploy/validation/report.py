"""The report: one record, written as report.json, report.html, junit.xml and summary.md."""

import base64
import io
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from pydantic import BaseModel

from mpdsgr_deploy.files import claim_directory, write_atomic
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.validation.gate import Gate
from mpdsgr_deploy.validation.health import Check
from mpdsgr_deploy.validation.rows import Row, Score

REPORT = "report.json"
Verdict = Literal["pass", "fail", "invalid"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "invalid": 3}


class Report(BaseModel):
    """Everything a verdict rests on. `images` states which images were used and by which rule."""

    schema_version: int = 1
    verdict: Verdict
    reasons: list[str]
    bundle: str
    network: str
    artefact_file: str
    artefact_sha256: str
    backend: str
    precision: str
    images: str
    seed: int
    rows: list[Row]
    parity: Parity
    health: list[Check]
    gate: Gate
    provenance: dict[str, Any]


def claim_report(directory: Path) -> None:
    """Fail early, before hours of attacks: the directory is usable and what rendering needs is installed."""
    claim_directory(directory, REPORT, "report")
    need("jinja2", "report")
    need("matplotlib", "report")


def write_report(report: Report, directory: Path) -> None:
    """Write all four files into `directory`; report.json last, since it marks the directory as complete."""
    write_atomic(directory / "summary.md", summary(report).encode())
    write_atomic(directory / "junit.xml", junit(report))
    write_atomic(directory / "report.html", page(report).encode())
    write_atomic(directory / REPORT, report.model_dump_json(indent=1).encode())


def percent(score: Score) -> str:
    """Accuracy and interval in %, for people."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def summary(report: Report) -> str:
    """A Markdown table, fit for a pull request comment."""
    lines = [
        f"## {report.verdict.upper()}: {report.bundle} ({report.precision}, {report.backend})",
        "",
        *(f"- {reason}" for reason in report.reasons),
        *([""] if report.reasons else []),
        f"{report.network}. Accuracy % with 95 % interval; {report.images}; seed {report.seed}.",
        "",
        "| condition | torch | artefact | newly wrong | newly right | McNemar p |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        worse, better, p = row.flips.newly_wrong, row.flips.newly_right, row.flips.p_value
        scores = f"{percent(row.reference)} | {percent(row.artefact)}"
        lines.append(f"| {row.name} | {scores} | {worse} | {better} | {p:.2g} |")
    lines += ["", f"Clean logits, torch against artefact: {report.parity}.", ""]
    lines += [f"- check {c.number}, {c.name}: {'ok' if c.passed else 'FAILED'}, {c.saw}" for c in report.health]
    return "\n".join(lines) + "\n"


def junit(report: Report) -> bytes:
    """One test case a health check and one for the gate, for CI systems that read JUnit."""
    suite = ElementTree.Element("testsuite", name=f"mpdsgr validate {report.bundle}")
    failed = 0
    cases = [(f"check {c.number}: {c.name}", None if c.passed else f"{c.saw}. {c.advice}") for c in report.health]
    cases.append(("gate", "; ".join(report.reasons) if report.verdict == "fail" else None))
    for name, failure in cases:
        case = ElementTree.SubElement(suite, "testcase", classname="mpdsgr", name=name)
        if failure is not None:
            failed += 1
            ElementTree.SubElement(case, "failure", message=failure)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(failed))
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def page(report: Report) -> str:
    """A self-contained HTML page: no script, no external asset."""
    from jinja2 import Environment, PackageLoader

    templates = Environment(loader=PackageLoader("mpdsgr_deploy.validation"), autoescape=True)
    template = templates.get_template("report.html")
    return template.render(report=report, percent=percent, chart=base64.b64encode(chart(report)).decode())


def chart(report: Report) -> bytes:
    """Accuracy of torch and artefact under each condition, with intervals: an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.34 * len(report.rows)), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(report.rows))
    for offset, label, colour in ((-0.2, "torch", "#8a94a6"), (0.2, "artefact", "#2563eb")):
        scores = [row.reference if label == "torch" else row.artefact for row in report.rows]
        accuracy = np.array([100 * s.accuracy for s in scores])
        bounds = np.array([[100 * b for b in s.interval] for s in scores]).reshape(-1, 2).T
        errors = np.abs(bounds - accuracy)
        axes.barh(positions + offset, accuracy, 0.38, xerr=errors, capsize=2, label=label, color=colour)
    axes.set_yticks(positions, [row.name for row in report.rows])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy (%)")
    axes.set_xlim(0, 105)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    return out.getvalue()
