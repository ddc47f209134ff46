"""What a table's page says where its networks were exported: the order of the defences, each precision, by eps."""

from collections.abc import Sequence
from statistics import fmean

from measured import Bools, Measured, baseline, by_eps, cell, difference, groups, grown
from result import Result
from table import Table
from tabular import markdown

from mpdsgr_deploy.recipes import find_recipe, published
from mpdsgr_deploy.validation.report import Report

GROWTH, MEMBRANES = "growth.png", "membranes.png"
PAPER, UNION = "pgd", "worst"  # the paper's setting, and everything within eps
COMPARED = {"clean": "clean", "PGD": PAPER, "union": UNION}


def order(table: Table, measured: Measured) -> str:
    """The rows by what survives everything, with and without adversarial training, beside their order under PGD."""
    parts = ["## Does the order persist?"]
    compared = {title: results for title, results in measured.items() if complete(results)}
    parts += [ranking(table, measured, group) for group in groups(compared).values()]
    note = (
        "Sorted by the union; (n) is the place in the order. `- baseline`: points of accuracy more than the row "
        "without the defence (REG, or AT alone), paired on the same images and seeds, with a 95 % interval for the "
        "choice of images; `seeds`: the union's of each seed. `paper`: what the paper states for PGD with its VGG11, "
        "T = 8, after 200 to 300 epochs; another network than this one."
    )
    spared = [title for title, results in measured.items() if not complete(results)]
    if spared:
        note += f" Ended early, so not compared: {', '.join(spared)}."
    return "\n\n".join([*parts, note])


def ranking(table: Table, measured: Measured, group: Measured) -> str:
    """One group as a table."""
    places = {c: sorted(group, key=lambda title: -mean(group[title], c)) for c in (PAPER, UNION)}
    rows = []
    for title in places[UNION]:
        results, other = group[title], baseline(measured, group[title])
        stated = published(find_recipe(table.row(title).recipe))
        cells = [f"{mean(results, c):.1f} ({places[c].index(title) + 1})" for c in (PAPER, UNION)]
        if other is None:
            differences = ["", "", ""]
        else:
            found = [difference(results, other, c) for c in (PAPER, UNION)]
            differences = [*map(str, found), ", ".join(f"{seed:+.1f}" for seed in found[1].seeds)]
        paper = f"{stated.pgd:.2f}" if stated and stated.pgd is not None else "-"
        rows.append([title, results[0].recipe.method, *cells, *differences, paper])
    columns = ["row", "method", "PGD", "union", "PGD - baseline", "union - baseline", "seeds", "paper"]
    return markdown(columns, rows)


def complete(results: list[Result]) -> bool:
    """Whether no evaluation of a row ended early: an attack it was spared says nothing."""
    return all(report.stopped is None for result in results for report in result.artefacts.values())


def mean(results: list[Result], condition: str) -> float:
    """Accuracy in %, mean over the seeds."""
    found = cell(results, condition)
    assert found is not None, condition
    return found.mean


def growth(measured: Measured) -> str:
    """The strong PGD by eps, as a picture and as a table."""
    found = {title: by_eps(results) for title, results in measured.items() if grown(results)}
    n = next(curve for results in measured.values() for curve in grown(results)).points[0].n
    rows = [[title, *(f"{value:.1f}" for value in values.values())] for title, values in found.items()]
    columns = ["row", *(f"{255 * eps:.3g}/255" for eps in next(iter(found.values())))]
    heading = f"Strong PGD through the trained surrogate by eps, the first {n} test images:"
    return f"![accuracy against eps]({GROWTH})\n\n{heading}\n\n{markdown(columns, rows)}"


def precisions(measured: Measured) -> str:
    """Every exported network: accuracy, what the gate said, and whose verdict differs from the first precision's."""
    rows = []
    for title, results in measured.items():
        for precision in results[0].artefacts if complete(results) else ():
            reports = [result.artefacts[precision] for result in results]
            first = [next(iter(result.artefacts.values())) for result in results]
            accuracy = [f"{100 * fmean(right(r, c).mean() for r in reports):.1f}" for c in COMPARED.values()]
            changed = ["" if reports == first else flips(first, reports, c) for c in COMPARED.values()]
            passed = f"{sum(report.verdict == 'pass' for report in reports)} of {len(reports)}"
            rows.append([title, precision, *accuracy, *changed, passed])
    columns = ["row", "precision", *COMPARED, *(f"{heading} flips" for heading in COMPARED), "gate passed"]
    note = (
        "`flips`: verdicts newly wrong / newly right against the first precision, each attacked through its own "
        "gradients, seeds added up. The union of int8 has one attack more: images made on the float32 network. "
        "`gate passed`: of the seeds; held against the torch network under the same attacks."
    )
    refused = [f"- {title}, seed {r.seed}, {p}: {reason}" for title, r, p, reason in refusals(measured)]
    parts = ["## The exported networks", markdown(columns, rows), note, "\n".join(refused)]
    return "\n\n".join(part for part in parts if part)


def right(report: Report, condition: str) -> Bools:
    """Which images an artefact gets right under a condition it met [n]."""
    row = report.row(condition)
    assert row is not None, condition
    return row.artefact.verdicts(row.n)


def flips(first: Sequence[Report], others: Sequence[Report], condition: str) -> str:
    """Images newly wrong and newly right, seeds added up."""
    pairs = [(right(a, condition), right(b, condition)) for a, b in zip(first, others, strict=True)]
    worse, better = (sum(int((a & ~b).sum()) for a, b in order) for order in (pairs, [(b, a) for a, b in pairs]))
    return f"{worse} / {better}"


def refusals(measured: Measured) -> list[tuple[str, Result, str, str]]:
    """Why a gate refused, or a check says that nothing is proved."""
    return [
        (title, result, precision, reason)
        for title, results in measured.items()
        for result in results
        for precision, report in result.artefacts.items()
        for reason in report.reasons
    ]
