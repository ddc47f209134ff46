"""The sections of a table's page about exported networks: rank of the defences, each precision, accuracy by eps."""

from collections.abc import Sequence
from statistics import fmean

from mpdsgr_deploy.experiments.compare import baseline, by_eps, cell, difference, groups, strong_curves
from mpdsgr_deploy.experiments.page_parts import markdown
from mpdsgr_deploy.experiments.records import AttackedExport, Measured, Record
from mpdsgr_deploy.experiments.table import TableSpec
from mpdsgr_deploy.recipes import find_recipe, published

GROWTH, MEMBRANES = "growth.png", "membranes.png"
PAPER, UNION = "pgd", "worst"  # the paper's setting, and everything within eps
COMPARED = {"clean": "clean", "PGD": PAPER, "union": UNION}


def order(table: TableSpec, measured: Measured) -> str:
    """Rank the rows, with and without adversarial training, by accuracy under all attacks and by PGD."""
    parts = ["## Does the order persist?"]
    compared = {title: records for title, records in measured.items() if complete(records)}
    parts += [ranking(table, measured, group) for group in groups(compared).values()]
    note = (
        "Sorted by the union; (n) is the place in the order. `- baseline`: points of accuracy more than the row "
        "without the defence (REG, or AT alone), paired on the same images and seeds, with a 95 % interval for the "
        "choice of images; `seeds`: the union's of each seed. `paper`: what the paper states for PGD with its VGG11, "
        "T = 8, after 200 to 300 epochs; another network than this one."
    )
    ended_early = [title for title, records in measured.items() if not complete(records)]
    if ended_early:
        note += f" Ended early, so not compared: {', '.join(ended_early)}."
    return "\n\n".join([*parts, note])


def ranking(table: TableSpec, measured: Measured, group: Measured) -> str:
    places = {c: sorted(group, key=lambda title: -mean(group[title], c)) for c in (PAPER, UNION)}
    rows = []
    for title in places[UNION]:
        records, other = group[title], baseline(measured, group[title])
        stated = published(find_recipe(table.row(title).recipe))
        cells = [f"{mean(records, c):.1f} ({places[c].index(title) + 1})" for c in (PAPER, UNION)]
        if other is None:
            differences = ["", "", ""]
        else:
            pgd, union = (difference(records, other, c) for c in (PAPER, UNION))
            differences = [str(pgd), str(union), ", ".join(f"{seed:+.1f}" for seed in union.seeds)]
        paper = f"{stated.pgd:.2f}" if stated and stated.pgd is not None else "-"
        rows.append([title, records[0].recipe.method, *cells, *differences, paper])
    columns = ["row", "method", "PGD", "union", "PGD - baseline", "union - baseline", "seeds", "paper"]
    return markdown(columns, rows)


def complete(records: list[Record]) -> bool:
    """Whether all evaluations of a row ran to the end. Rows that lack attacks are not ranked."""
    return all(artefact.stopped is None for record in records for artefact in record.artefacts.values())


def mean(records: list[Record], condition: str) -> float:
    accuracy = cell(records, condition)
    assert accuracy is not None, condition
    return accuracy.mean


def growth(measured: Measured) -> str:
    """Show the strong PGD by eps, as a plot and as a table."""
    curves = {title: by_eps(records) for title, records in measured.items() if strong_curves(records)}
    n = next(curve for records in measured.values() for curve in strong_curves(records))[0][2]
    rows = [[title, *(f"{value:.1f}" for value in values.values())] for title, values in curves.items()]
    columns = ["row", *(f"{255 * eps:.3g}/255" for eps in next(iter(curves.values())))]
    heading = f"Strong PGD through the trained surrogate by eps, the first {n} test images:"
    return f"![accuracy against eps]({GROWTH})\n\n{heading}\n\n{markdown(columns, rows)}"


def precisions(measured: Measured) -> str:
    """Show each precision's accuracy, how many passed the gate, and the verdicts that differ from the first's."""
    rows = []
    for title, records in measured.items():
        for precision in records[0].artefacts if complete(records) else ():
            artefacts = [record.artefacts[precision] for record in records]
            first = [next(iter(record.artefacts.values())) for record in records]
            accuracy = [f"{100 * fmean(a.accuracy(c) for a in artefacts):.1f}" for c in COMPARED.values()]
            changed = ["" if artefacts == first else flips(first, artefacts, c) for c in COMPARED.values()]
            passed = f"{sum(artefact.verdict == 'pass' for artefact in artefacts)} of {len(artefacts)}"
            rows.append([title, precision, *accuracy, *changed, passed])
    columns = ["row", "precision", *COMPARED, *(f"{heading} flips" for heading in COMPARED), "gate passed"]
    note = (
        "`flips`: verdicts newly wrong / newly right against the first precision, each attacked through its own "
        "gradients, seeds added up. The union of int8 has one attack more: images made on the float32 network. "
        "`gate passed`: of the seeds; compared with the torch network under the same attacks."
    )
    refused = [f"- {title}, seed {seed}, {p}: {reason}" for title, seed, p, reason in refusals(measured)]
    parts = ["## The exported networks", markdown(columns, rows), note, "\n".join(refused)]
    return "\n\n".join(part for part in parts if part)


def flips(first: Sequence[AttackedExport], others: Sequence[AttackedExport], condition: str) -> str:
    """Return the numbers of images newly wrong and newly right, summed over seeds."""
    pairs = [(a.verdicts(condition), b.verdicts(condition)) for a, b in zip(first, others, strict=True)]
    worse, better = (sum(int((a & ~b).sum()) for a, b in order) for order in (pairs, [(b, a) for a, b in pairs]))
    return f"{worse} / {better}"


def refusals(measured: Measured) -> list[tuple[str, int, str, str]]:
    """List row, seed, precision and reason of every failed gate and invalid evaluation."""
    return [
        (title, record.seed, precision, reason)
        for title, records in measured.items()
        for record in records
        for precision, artefact in record.artefacts.items()
        for reason in artefact.reasons
    ]
