"""report.html: one file that needs no script, no network and no other file."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpdsgr_deploy.validation.figures import figures
from mpdsgr_deploy.validation.report import (
    MEANING,
    Report,
    accuracy_text,
    findings,
    headline_first,
    not_compared,
    sensitivity,
)


def page(report: Report) -> str:
    """Render the page. Names of files, labels and conditions are untrusted: the template escapes all but our SVG."""
    loader = PackageLoader("mpdsgr_deploy.validation")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("report.html").render(
        report=report,
        meaning=MEANING[report.verdict],
        findings=list(findings(report)),
        headlines=[(title, row) for title, row in headlines(report) if row is not None],
        figures={title: Markup(drawn) for title, drawn in figures(report).items()},
        gate=[(name, plain(value)) for name, value in report.gate],
        provenance=list(provenance(report)),
        accuracy_text=partial(accuracy_text, stopped=report.stopped),
        not_compared=not_compared(report),
        rows=headline_first(report),
        sensitivity=sensitivity(report),
    )


def headlines(report: Report) -> Iterator[tuple[str, Any]]:
    """Return the two accuracies at the top of the page: clean, and under all attacks together."""
    yield "clean", report.row("clean")
    yield (
        f"under every attack, eps {report.eps:.4g}" if report.eps is not None else "under every attack",
        report.row("worst"),
    )


def provenance(report: Report) -> Iterator[tuple[str, str]]:
    """Return what identifies this evaluation, then its machine and software versions."""
    yield "artefact", report.artefact_file
    yield "sha256 of the artefact", report.artefact_sha256
    yield "images", report.images
    yield "sha256 of the images", report.images_sha256
    yield "seed", str(report.seed)
    yield "took", f"{report.seconds:.1f} s"
    for name, value in report.provenance.items():
        yield name, plain(value)


def plain(value: Any) -> str:
    """Format a setting of any type as text."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or "none"
    return str(value)
