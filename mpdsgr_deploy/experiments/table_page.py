"""The page of a table: records as Markdown tables and plots."""

import re
from pathlib import Path
from statistics import fmean

from mpdsgr_deploy.attacks.condition import CLEAN, FGSM, PGD
from mpdsgr_deploy.experiments import front, table_plots, table_sections
from mpdsgr_deploy.experiments.markdown import markdown, publish
from mpdsgr_deploy.experiments.page_parts import (
    accuracy_on_test_set,
    behaviour,
    seeds,
    sources,
    unhealthy,
    union_suite,
    unmeasured,
)
from mpdsgr_deploy.experiments.records import Measured, Record, load_measured
from mpdsgr_deploy.experiments.row_comparison import SHOWN, STRONG, cell, published_figures, shorts, strong_curves
from mpdsgr_deploy.experiments.table import TableSpec

COLUMNS = {**SHOWN, **STRONG}  # heading -> condition, in the table of accuracies
EPS_PLOT = "eps.png"
EPOCHS_PLOT = "epochs.png"
PAGE, PLOT = "README.md", "plot.png"


def write_page(name: str, table: TableSpec, folder: Path) -> Path:
    measured = load_measured(table, folder)
    drawn = pictures(table, measured) if measured else {}
    return publish(folder / PAGE, render(name, table, measured), drawn)


def pictures(table: TableSpec, measured: Measured) -> dict[str, bytes]:
    """Return the PNG files for which there are enough records, by file name."""
    drawn: dict[str, bytes | None] = {
        PLOT: table_plots.accuracies(table, measured),
        EPS_PLOT: table_plots.within_eps(table, measured),
        EPOCHS_PLOT: table_plots.by_epoch(measured),
        front.FRONT: front.picture(measured),
    }
    if table.artefact is not None:
        drawn[table_sections.GROWTH] = table_plots.growth(measured)
        drawn[table_sections.MEMBRANES] = table_plots.membranes(measured, table.artefact.membranes)
    return {name: picture for name, picture in drawn.items() if picture is not None}


def render(name: str, table: TableSpec, measured: Measured) -> str:
    parts = [f"# {table.title}", f"Rendered from `results.jsonl` by `mpdsgr table {name}`."]
    if table.set:
        parts.append(f"All rows: {', '.join(f'`{override}`' for override in table.set)}.")
    named = [row for row in table.rows if row.name]
    meanings = [
        f"`{r.title}` is `{r.recipe}`{' with ' if r.set else ''}{', '.join(f'`{o}`' for o in r.set)}" for r in named
    ]
    parts += [f"Rows: {'; '.join(meanings)}."] if named else []
    if measured:
        parts += [
            accuracies(measured),
            by_attack(measured),
            unhealthy(measured),
            table_sections.against_none(measured),
            front.section(measured),
            f"![accuracy of every row]({PLOT})",
            f"![accuracy against eps]({EPS_PLOT})" if table.eps else "",
            f"![accuracy by epoch, clean and under PGD]({EPOCHS_PLOT})"
            if table_plots.attacked_by_epoch(measured)
            else "",
            beside_published(table, measured),
        ]
        if table.eta_budget is not None:
            parts.append(table_sections.choice(measured, table.eta_budget))
        parts += exported(table, measured)
        parts += ["## Where it was measured", sources(measured)]
    parts.append(unmeasured(table, measured))
    return "\n\n".join(part for part in parts if part) + "\n"


def exported(table: TableSpec, measured: Measured) -> list[str]:
    """Return the sections that explain the accuracies, after those about exported networks, if there are any."""
    explained = ["## Behind the accuracies", behaviour(measured)]
    if table.artefact is None:
        return explained
    parts = [table_sections.order(table, measured)]
    if any(map(strong_curves, measured.values())):
        parts.append(table_sections.growth(measured))
    parts += [table_sections.precisions(measured), *explained]
    defence = table.artefact.membranes
    if table_plots.with_and_without(measured, defence):
        parts.append(
            f"![membrane potentials with {defence and defence.upper()} and without]({table_sections.MEMBRANES})"
        )
    return parts


def quote(name: str, measured: Measured, text: str) -> str:
    """Return `text` with the short form of a table between its markers, in place of what is there.

        <!-- table: NAME -->                      every row
        <!-- table: NAME rows: ROW, ROW -->       these rows, as far as they are measured
        <!-- end of table -->

    Nothing changes between markers of rows that are not measured.
    """

    def replaced(marker: re.Match[str]) -> str:
        rows = re.split(r",\s*", marker["rows"]) if marker["rows"] else list(measured)
        chosen = {row: measured[row] for row in rows if row in measured}
        return f"{marker['begin']}\n{short(chosen)}\n{marker['end']}" if chosen else marker[0]

    begin, end = rf"<!-- table: {re.escape(name)}( rows: (?P<rows>[^>]*?))? -->", "<!-- end of table -->"
    return re.sub(rf"(?P<begin>{begin})\n.*?(?P<end>{end})", replaced, text, flags=re.DOTALL)


def short(measured: Measured) -> str:
    """Show the mean accuracy of every row and the deviation between seeds, under the main conditions.

    The accuracy on all test images comes first if every row has it.
    """
    within = {name.replace(PGD, "PGD"): name for name in conditions(measured) if name.startswith(f"{PGD} ")}
    columns = {"clean": CLEAN, "FGSM": FGSM, **within, "PGD": PGD, **STRONG}
    names = table_plots.labels([records[0] for records in measured.values()])
    complete = all(record.test_set is not None for records in measured.values() for record in records)
    whole = {"clean, all test images": accuracy_on_test_set} if complete else {}
    rows = [
        [names[title], *(accuracy(records) for accuracy in whole.values()), *shorts(records, columns)]
        for title, records in measured.items()
    ]
    return f"{markdown(['method', *whole, *columns], rows)}\n\n{union_suite(measured)}"


def conditions(measured: Measured) -> list[str]:
    """Return all conditions that some row was measured under, in the order of the attack suite."""
    return list(dict.fromkeys(name for records in measured.values() for name in records[0].attacked.conditions))


def accuracies(measured: Measured) -> str:
    """Show accuracies under the conditions of COLUMNS with intervals, and the wall time of training."""
    rows = []
    for title, records in measured.items():
        cells = [str(cell(records, condition) or "-") for condition in COLUMNS.values()]
        n = str(records[0].attacked.n)
        rows.append([title, records[0].recipe.method, seeds(records), n, *cells, training_time(records)])
    note = (
        "Accuracy in %: the mean over the seeds, ± the standard deviation between them, [95 % Wilson interval for the "
        "choice of the n test images, which are the same for every seed and row]. `strong`: broken by any iterate of "
        "the strong PGD; `union`: right under every condition within eps. `training`: wall time of one run"
        + (", after that of the runs whose weights it started from." if any(map(was_tuned, measured.values())) else ".")
    )
    return markdown(["row", "method", "seeds", "n", *COLUMNS, "training"], rows) + f"\n\n{note}"


def was_tuned(records: list[Record]) -> bool:
    return records[0].init is not None


def training_time(records: list[Record]) -> str:
    """Return the wall time of a row's training, and that of the earlier ones it builds on, averaged over seeds."""
    own, before = (fmean(times) / 60 for times in zip(*((r.seconds, r.seconds_before) for r in records), strict=True))
    return f"{own:.1f} min after {before:.1f} min" if before else f"{own:.1f} min"


def by_attack(measured: Measured) -> str:
    """Show accuracies under the conditions that are not in COLUMNS; empty if there are none."""
    extra = {name: name for name in conditions(measured) if name not in COLUMNS.values()}
    if not extra:
        return ""
    rows = [[title, *shorts(records, extra)] for title, records in measured.items()]
    heading = "Under the other conditions (`strong NAME`: strong PGD through that surrogate; `strong adaptive`: SA-PGD)"
    return f"{heading}:\n\n{markdown(['row', *extra], rows)}"


def beside_published(table: TableSpec, measured: Measured) -> str:
    """Show measured beside published accuracies, for rows with published figures; empty if there are none."""
    stated = {title: figures for title in measured if (figures := published_figures(table, title))}
    published = {h: c for h, c in SHOWN.items() if any(getattr(figures, c) is not None for figures in stated.values())}
    if not published:
        return ""
    rows = []
    for title, figures in stated.items():
        cells = []
        for condition in published.values():
            value, accuracy = getattr(figures, condition), cell(measured[title], condition)
            cells += [f"{accuracy.mean:.1f}" if accuracy else "-", "-" if value is None else f"{value:.2f}"]
        rows.append([title, *cells, figures.table])
    columns = [heading for h in published for heading in (h, f"{h}, published")]
    changed = " This table changes what is listed above, so the two differ in more than chance." if table.set else ""
    note = f"Published figures are those of the unchanged recipes.{changed}"
    return f"## Beside the published figures\n\n{markdown(['row', *columns, 'published in'], rows)}\n\n{note}"
