"""Render report.html, a page that needs no script, no network and no other file.

Figures are SVG elements of the page, so their text is text in the page's colour, also in dark mode. Lines differ in
markers and dashes as well as in colour. Figures are narrow enough for a telephone to show their text in full size; a
wide page places them side by side.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpdsgr_deploy.attacks.condition import CLEAN, STRONG, WORST
from mpdsgr_deploy.diagnostics.picture import BLUE, GREEN, GREY, GRID, ORANGE, PURPLE, SKY_BLUE, VERMILION
from mpdsgr_deploy.validation.report import (
    MEANING,
    Curve,
    Report,
    accuracy_text,
    findings,
    headline_first,
    not_compared,
    sensitivity,
)
from mpdsgr_deploy.validation.rows import Row

WIDTH = 4.1  # of a figure, in inches
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, GREY)
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":", "-", "--", "-.")
HEADLINE, ATTACKER = VERMILION, BLUE
INK = "#010203"  # stands for the page's text colour, which replaces it in the SVG
WIDEST = 4.2  # largest eps of an axis, as a multiple of the evaluated eps
MOST = 24  # largest number of attackers in a figure, which then shows the strongest
LONGEST = 22  # largest number of characters of a name in a figure
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mpdsgr",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def page(report: Report) -> str:
    """Return the page as HTML. Names of files, labels and conditions are untrusted: all text but our SVG is escaped."""
    loader, strict = PackageLoader("mpdsgr_deploy.validation"), StrictUndefined
    templates = Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template("report.html").render(
        report=report,
        meaning=MEANING[report.verdict],
        findings=list(findings(report)),
        headlines=headlines(report),
        figures={title: Markup(drawn) for title, drawn in figures(report).items()},
        gate=[(name, plain(value)) for name, value in report.gate],
        provenance=list(provenance(report)),
        accuracy_text=partial(accuracy_text, stopped=report.stopped),
        not_compared=not_compared(report),
        rows=headline_first(report),
        sensitivity=sensitivity(report),
    )


def headlines(report: Report) -> list[tuple[str, Row]]:
    """Return title and row of the accuracies at the top that were measured: clean, and under all attacks."""
    within = "" if report.eps is None else f", eps {report.eps:.4g}"
    titles = {CLEAN: "clean", WORST: f"under every attack{within}"}
    return [(title, row) for name, title in titles.items() if (row := report.row(name))]


def provenance(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what identifies this evaluation, then its machine and software versions, as name and text."""
    yield "artefact", report.artefact_file
    yield "sha256 of the artefact", report.artefact_sha256
    yield "images", report.images
    yield "sha256 of the images", report.images_sha256
    yield "seed", str(report.seed)
    yield "took", f"{report.seconds:.1f} s"
    for name, value in report.provenance.items():
        yield name, plain(value)


def plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or "none"
    return str(value)


def figures(report: Report) -> dict[str, str]:
    """Return the figures that the report has data for, as SVG elements by title."""
    pictures = {}
    with rc_context(SETTINGS):
        if any(curve.points for curve in report.curves):
            omitted_note = f", the {len(COLOURS)} strongest attacks" if len(report.curves) > len(COLOURS) else ""
            pictures[f"Accuracy against eps{omitted_note}"] = svg(by_eps(report), "eps")
        if sweep(report):
            omitted_note = f" {MOST} of {len(attackers(report))}" if len(attackers(report)) > MOST else ""
            pictures[f"Which attacker is the strongest?{omitted_note}"] = svg(by_attacker(report), "attackers")
    return pictures


def by_eps(report: Report) -> Figure:
    """Plot the artefact's accuracy under each attack against eps, with the evaluated eps marked."""
    figure, axes = blank(3.2)
    curves = sorted((c for c in report.curves if c.points), key=final)[: len(COLOURS)]
    for curve, colour, marker, dash in zip(curves, COLOURS, MARKERS, DASHES, strict=False):
        points = sorted(curve.points, key=lambda point: point.eps)
        accuracy = [100 * point.correct / max(point.n, 1) for point in points]
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "markersize": 4.5,
            "linewidth": 1.6,
        }
        axes.plot([point.eps for point in points], accuracy, label=short(curve.attack), **style)
    if report.eps is not None:
        axes.axvline(report.eps, color=INK, linewidth=1, linestyle=":", label=f"evaluated: eps {report.eps:.3g}")
    axes.set(xlabel="eps, the largest change of a pixel", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_xlim(0, shown_eps(report))
    axes.grid(axis="y", color=GRID, alpha=0.3, linewidth=0.6)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


def shown_eps(report: Report) -> float:
    """Return the largest eps on the axis, a few times the evaluated one. Health check 4 looks at larger values."""
    largest = max(point.eps for curve in report.curves for point in curve.points)
    return largest if report.eps is None else min(largest, WIDEST * report.eps)


def by_attacker(report: Report) -> Figure:
    """Plot the accuracy with its interval under each white-box attacker, and at the top under all attacks together."""
    rows = sweep(report)
    worst = report.row(WORST)
    bars = rows if worst is None else [worst, *rows]
    figure, axes = blank(0.9 + 0.3 * len(bars))
    for place, row in enumerate(bars):
        low, high = (100 * bound for bound in row.artefact.interval)
        accuracy = 100 * row.artefact.accuracy
        colour, marker, size = (HEADLINE, "D", 7.0) if row is worst else (ATTACKER, "o", 5.0)
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([accuracy], [place], marker=marker, color=colour, markersize=size, clip_on=False)
        axes.annotate(
            f"{accuracy:.1f}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    if worst is not None:
        axes.axvline(100 * worst.artefact.accuracy, color=HEADLINE, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(bars)), [named(row) for row in bars])
    axes.set(xlabel="accuracy (%), 95 % interval", xlim=(0, 100), ylim=(len(bars) - 0.5, -0.5))
    axes.grid(axis="x", color=GRID, alpha=0.3, linewidth=0.6)
    return figure


def attackers(report: Report) -> list[Row]:
    """Return the rows of the strong white-box attacks, one for each surrogate."""
    return [row for row in report.rows if row.surrogate is not None]


def sweep(report: Report) -> list[Row]:
    """Return the MOST strongest attackers, the strongest last."""
    return sorted(attackers(report), key=lambda row: -row.artefact.accuracy)[-MOST:]


def named(row: Row) -> str:
    if row.name == WORST:
        return "worst: the union"
    return "trained surrogate" if row.name == STRONG else short(str(row.surrogate))


def final(curve: Curve) -> float:
    """Return the accuracy in [0, 1] at the largest eps."""
    last = max(curve.points, key=lambda point: point.eps)
    return last.correct / max(last.n, 1)


def short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def blank(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element; `name` makes its ids unique in the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(<[^<>]*\s)id="', rf'\1id="{name}-', text)
    text = re.sub(r'(<[^<>]*(?:url\(|href="))#', rf"\1#{name}-", text)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
