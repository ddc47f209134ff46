"""Rank the validation reports of several networks by accuracy under all attacks.

Only complete and valid reports with the same images, eps, tier and version of the attack suite are ranked together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import APGD_CE, APGD_DLR, CLEAN, MPD_APGD, PGD, SQUARE, WORST
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments.markdown import markdown
from mpdsgr_deploy.validation.report import Report, load_report, percent
from mpdsgr_deploy.validation.rows import VerdictFlips

CONDITIONS = {"PGD": PGD, "APGD-CE": APGD_CE, "APGD-DLR": APGD_DLR, "Square": SQUARE, "MPD-APGD": MPD_APGD}
COMPARED: dict[str, Callable[[Report], Any]] = {
    "images": lambda report: f"{report.images}, sha256 {report.images_sha256[:16]}",
    "number of images": lambda report: report.rows[0].n,
    "eps": lambda report: report.eps,
    "tier": lambda report: report.tier,
    "attack suite": lambda report: report.suite,
}


class RankedReport(NamedTuple):
    """A report, and the path that it was read from."""

    source: str
    report: Report

    def right(self, condition: str) -> NDArray[np.bool_]:
        """Return the verdicts [n] under a condition that the report has."""
        row = self.report.row(condition)
        assert row is not None, condition
        return row.artefact.verdicts(row.n)


def read_report(path: Path) -> RankedReport:
    """Read a report from its file, or from the directory that `mpdsgr validate` wrote.

    Raises InputError for a report that is missing or damaged, and for one whose accuracies cannot be ranked, because it
    ended before all attacks were made or a health check failed.
    """
    report = load_report(path)
    if report.stopped is not None or report.row(WORST) is None:
        raise InputError(
            f"{path} was stopped early ({report.stopped}), so its accuracy under all attacks is only an upper bound "
            "and cannot be ranked"
        )
    if report.verdict == "invalid":
        raise InputError(
            f"{path} is the report of an evaluation that is not valid ({report.reasons[0]}), so it cannot be ranked"
        )
    return RankedReport(str(path), report)


def ranked(entries: Sequence[RankedReport]) -> list[RankedReport]:
    """Sort the entries by accuracy under all attacks, then by clean accuracy, best first.

    Raises InputError, which names two reports and how they differ, if they cannot be compared.
    """
    first, *others = entries
    for what, value in COMPARED.items():
        for other in others:
            if value(other.report) != value(first.report):
                raise InputError(
                    f"{first.source} and {other.source} cannot be ranked together: {what} {value(first.report)} and "
                    f"{value(other.report)}; validate both with the same images, tier and version"
                )
    return sorted(entries, key=lambda entry: (-entry.right(WORST).sum(), -entry.right(CLEAN).sum(), entry.source))


def render(entries: Sequence[RankedReport]) -> str:
    """Return the page as Markdown. Raises InputError as `ranked` does."""
    order = ranked(entries)
    report = order[0].report
    tried = {title: name for title, name in CONDITIONS.items() if all(e.report.row(name) for e in order)}
    rows = [line(place, order, tried) for place in range(len(order))]
    columns = ["", "method", "network", "T", "parameters", "MACs", "precision", "clean", *tried, "union", "p", "cost"]
    eps = f"{report.eps:.4g}" if report.eps is not None else "none"
    parts = [
        "# Leaderboard",
        f"Rendered by `mpdsgr table --from` from {len(order)} validation reports: {report.images}, eps {eps}, tier "
        f"`{report.tier}`, attack suite {report.suite}. Accuracy in % with its 95 % Wilson interval, of the exported "
        "networks.",
        markdown(columns, rows),
        "Ranked by `union`: right under every condition within eps. `p`: exact McNemar test of the union against the "
        "row above on the same images; a large one means that the order of the two may be chance. `cost`: gradients or "
        "queries an image took, all attacks together. `MACs`: multiply-accumulates for an image. Each report is of one "
        "trained network: how seeds differ does not show here.",
        "\n".join(sorted({origin(entry.report) for entry in order})),
    ]
    return "\n\n".join(parts) + "\n"


def line(place: int, order: Sequence[RankedReport], tried: dict[str, str]) -> list[str]:
    entry = order[place]
    report, model = entry.report, entry.report.model
    facts = ["-"] * 5
    if model is not None:
        facts = [model.method, model.architecture, str(model.steps), f"{model.parameters:,}", f"{model.macs:,}"]
    accuracies = [percent(row.artefact) for name in (CLEAN, *tried.values(), WORST) if (row := report.row(name))]
    flips = VerdictFlips.of(order[place - 1].right(WORST), entry.right(WORST))
    p = "" if place == 0 else f"{flips.p_value:.2g}"
    cost = sum(row.evaluations for row in report.rows)
    return [str(place + 1), *facts, report.precision, *accuracies, p, f"{cost:.0f}"]


def origin(report: Report) -> str:
    """Describe network, backend, machine and code revision of a report on one line."""
    machine, packages = report.provenance["hardware"], report.provenance["packages"]
    revision = report.provenance.get("revision")
    code = f"mpdsgr-deploy {report.provenance['mpdsgr_deploy']}" if revision is None else f"revision {revision}"
    return (
        f"- {report.network}: {report.backend}, seed {report.seed}; {machine['cpu']}, {machine['cores']} cores; "
        f"onnxruntime {packages.get('onnxruntime', '-')}; {code}"
    )
