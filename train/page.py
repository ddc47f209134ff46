"""The page of a table: what its results files hold, as Markdown and as plots."""

from pathlib import Path
from statistics import fmean

import deployed_page
import eta_page
import plots
from measured import SHOWN, STRONG, Measured, cell, figures, grown, load_results, omega
from result import Result
from table import Table
from tabular import markdown

from mpdsgr_deploy.files import write_atomic

OTHERS = ("transfer", "cw-l2", "apgd-ce", "apgd-dlr", "square")  # attacks that not every table has
PAGE, PLOT = "README.md", "plot.png"


def write_page(name: str, table: Table, folder: Path) -> Path:
    """Render the page and the plot of the results in `folder` into it."""
    measured = load_results(table, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if measured:
        for file, picture in pictures(table, measured).items():
            write_atomic(folder / file, picture)
    write_atomic(folder / PAGE, render(name, table, measured).encode())
    return folder / PAGE


def pictures(table: Table, measured: Measured) -> dict[str, bytes]:
    """PNG files by name."""
    found = {PLOT: plots.accuracies(table, measured)}
    if table.artefact is not None:
        drawn = {deployed_page.GROWTH: plots.growth(measured), deployed_page.MEMBRANES: plots.membranes(measured)}
        found |= {name: picture for name, picture in drawn.items() if picture is not None}
    return found


def render(name: str, table: Table, measured: Measured) -> str:
    """The whole page."""
    parts = [f"# {table.title}", f"Rendered from the JSON files beside it: `python train/reproduce.py {name}`."]
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
            f"![accuracy of every row]({PLOT})",
            beside_published(table, measured),
        ]
        if table.eta_budget is not None:
            parts.append(eta_page.choice(measured, table.eta_budget))
        if table.artefact is not None:
            parts.append(deployed_page.order(table, measured))
            if any(map(grown, measured.values())):
                parts.append(deployed_page.growth(measured))
            parts.append(deployed_page.precisions(measured))
        parts += ["## Behind the accuracies", behaviour(measured)]
        if table.artefact is not None and plots.pairs(measured):
            parts.append(f"![membrane potentials with MPD-SGR and without]({deployed_page.MEMBRANES})")
        parts += ["## Where it was measured", sources(measured)]
    missing = [row.title for row in table.rows if row.title not in measured]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def quote(name: str, measured: Measured, text: str) -> str:
    """`text` with the short form of a table between its markers, `<!-- table: NAME -->` and `<!-- end of table -->`."""
    begin, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
    if begin not in text:
        return text
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{short(measured)}\n{end}{after}"


def short(measured: Measured) -> str:
    """Mean accuracies of every row, with the deviation between seeds, under the conditions that decide."""
    columns = {"clean": "clean", "FGSM": "fgsm", "PGD": "pgd", **STRONG}
    methods = [results[0].recipe.method for results in measured.values()]
    rows = []
    for (title, results), method in zip(measured.items(), methods, strict=True):
        cells = [str(found).partition(" [")[0] if (found := cell(results, c)) else "-" for c in columns.values()]
        rows.append([method if methods.count(method) == 1 else f"{method} ({title})", *cells])
    return markdown(["method", *columns], rows)


def accuracies(measured: Measured) -> str:
    """Every condition with its uncertainty, and the wall time of training."""
    columns = {**SHOWN, **STRONG}
    rows = []
    for title, results in measured.items():
        n = results[0].evaluation.rows[0].n
        cells = [str(found) if (found := cell(results, condition)) else "-" for condition in columns.values()]
        minutes = fmean(result.seconds for result in results) / 60
        rows.append([title, results[0].recipe.method, seeds(results), str(n), *cells, f"{minutes:.1f} min"])
    note = (
        "Accuracy in %: the mean over the seeds, ± the standard deviation between them, [95 % Wilson interval for the "
        "choice of the n test images, which are the same for every seed and row]. `strong`: broken by any iterate of "
        "the strong PGD; `union`: right under every condition within eps. `training`: wall time of one run."
    )
    return markdown(["row", "method", "seeds", "n", *columns, "training"], rows) + f"\n\n{note}"


def by_attack(measured: Measured) -> str:
    """The strong PGD through each of the attacker's surrogates, and other attacks that not every table has."""
    names = dict.fromkeys(row.name for results in measured.values() for row in results[0].evaluation.rows)
    extra = [name for name in names if name.startswith("strong ") or name in OTHERS]
    if not extra:
        return ""
    rows = [[t, *(str(cell(r, name) or "-").partition(" [")[0] for name in extra)] for t, r in measured.items()]
    heading = "What the attacker's choice of surrogate does to the strong PGD"
    others = " and what other attacks leave" if any(name in OTHERS for name in extra) else ""
    return f"{heading}{',' if others else ''}{others}:\n\n{markdown(['row', *extra], rows)}"


def unhealthy(measured: Measured) -> str:
    """The evaluations that are not to be believed, and why."""
    results = [result for found in measured.values() for result in found]
    checked = [result for result in results if result.evaluation.health]
    lines = [f"Health checks were made in {len(checked)} of {len(results)} evaluations."]
    for result in checked:
        failed = [check for check in result.evaluation.health if not check.passed]
        lines += [f"- {result.row}, seed {result.seed}: check {c.number} ({c.name}) failed: {c.saw}" for c in failed]
    return "\n".join([lines[0], "", *lines[1:]] if lines[1:] else lines)


def seeds(results: list[Result]) -> str:
    """The seeds of a row's results."""
    return ", ".join(map(str, sorted(result.seed for result in results)))


def beside_published(table: Table, measured: Measured) -> str:
    """Measured against published means, for the rows and conditions that have both."""
    stated = {title: found for title in measured if (found := figures(table, title))}
    shown = {h: c for h, c in SHOWN.items() if any(getattr(found, c) is not None for found in stated.values())}
    if not shown:
        return ""
    rows = []
    for title, found in stated.items():
        cells = []
        for condition in shown.values():
            value, own = getattr(found, condition), cell(measured[title], condition)
            cells += [f"{own.mean:.1f}" if own else "-", "-" if value is None else f"{value:.2f}"]
        rows.append([title, *cells, found.table])
    columns = [heading for h in shown for heading in (h, f"{h}, published")]
    changed = " This table changes what is listed above, so the two differ in more than chance." if table.set else ""
    note = f"Published figures are those of the unchanged recipes.{changed}"
    return f"## Beside the published figures\n\n{markdown(['row', *columns, 'published in'], rows)}\n\n{note}"


def behaviour(measured: Measured) -> str:
    """Membrane statistics, and what perturbations do in units of the network's own margin; means over seeds."""
    rows = []
    for title, results in measured.items():
        found = [result.sensitivity for result in results if result.sensitivity["n"]]
        layers = [result.layers for result in results]

        def mean(values: list[float]) -> str:
            return f"{fmean(values):.2f}" if values else "-"

        firing = [fmean(own[end]["firing_rate"] for own in layers) for end in (0, -1)]
        drops = [mean([f[kind] / f["margin"] for f in found]) for kind in ("promised", "noise", "pgd")]
        flipped = [list(f["flipped_pgd"].values()) for f in found]
        flips = " / ".join(f"{fmean(own[end] for own in flipped):.3f}" for end in (0, -1)) if flipped else "-"
        cells = [f"{omega(results):.3f}", f"{firing[0]:.3f} / {firing[1]:.3f}", mean([f["margin"] for f in found])]
        rows.append([title, *cells, *drops, flips])
    columns = ["row", "Omega", "firing rate, first / last layer", "margin", "promised / margin", "noise / margin"]
    note = (
        "`promised` is the drop of the margin (true logit minus the best other) that the surrogate gradient announces "
        "for a step of eps, `noise` and `pgd` the drop that really follows, on images the network gets right; see "
        "`train/sensitivity.py`."
    )
    return markdown([*columns, "pgd / margin", "flipped by pgd, first / last layer"], rows) + f"\n\n{note}"


def sources(measured: Measured) -> str:
    """Images, hardware, versions and revisions, each distinct one once."""
    lines = set()
    for result in (result for results in measured.values() for result in results):
        for what, origin in (("training", result.provenance), ("evaluation", result.evaluation.provenance)):
            machine = origin["hardware"]
            devices = ", ".join([f"{machine['cpu']}, {machine['cores']} cores", *machine.get("gpus", [])])
            subject = f" of {origin.get('network', 'the trained network')} on {result.evaluation.images}"
            versions = f"torch {origin['packages']['torch']}, revision {origin['revision']}"
            lines.add(f"- {what}{subject if what == 'evaluation' else ''}: {devices}; {versions}")
    return "\n".join(sorted(lines))
