"""Sections of a table's page: exported networks, the choice of eta, and fine-tuning from the same weights."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mpdsgr_deploy.attacks.condition import CLEAN, FGSM, GAUSSIAN, PGD, SQUARE, STRONG, WORST
from mpdsgr_deploy.experiments.markdown import markdown
from mpdsgr_deploy.experiments.records import AttackedExport, Measured, Record
from mpdsgr_deploy.experiments.row_comparison import (
    baseline,
    by_eps,
    cell,
    difference,
    groups,
    paired,
    strong_curves,
    validation_accuracy,
)
from mpdsgr_deploy.experiments.table import TableSpec
from mpdsgr_deploy.recipes import find_recipe, published

GROWTH, MEMBRANES = "growth.png", "membranes.png"
NONE_RIGHT = "none right"  # in place of the difference of two rows that get no image right
COMPARED = {"clean": CLEAN, "PGD": PGD, "union": WORST}
# headings of the conditions that `against_none` shows, besides PGD within any eps
HEADINGS = {CLEAN: CLEAN, GAUSSIAN: GAUSSIAN, FGSM: "FGSM", STRONG: "strong", SQUARE: SQUARE, WORST: "union"}
UNDEFENDED_ENCODINGS = {"direct", "frames"}


def order(table: TableSpec, measured: Measured) -> str:
    """Show the order of the rows by accuracy under all attacks and under PGD, apart for adversarial training."""
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
    """Show the rows of `group` in order, with their differences to baselines, which may be any rows of `measured`."""
    places = {c: sorted(group, key=lambda title: -mean(group[title], c)) for c in (PGD, WORST)}
    rows = []
    for title in places[WORST]:
        records, other = group[title], baseline(measured, group[title])
        stated = published(find_recipe(table.row(title).recipe))
        cells = [f"{mean(records, c):.1f} ({places[c].index(title) + 1})" for c in (PGD, WORST)]
        if other is None:
            differences = ["", "", ""]
        else:
            pgd, union = (difference(records, other, c) for c in (PGD, WORST))
            by_seed = paired(records, other, WORST)[0].mean(1)
            differences = [str(pgd or NONE_RIGHT), str(union or NONE_RIGHT), ", ".join(f"{s:+.1f}" for s in by_seed)]
        paper = f"{stated.pgd:.2f}" if stated and stated.pgd is not None else "-"
        rows.append([title, records[0].recipe.method, *cells, *differences, paper])
    columns = ["row", "method", "PGD", "union", "PGD - baseline", "union - baseline", "seeds", "paper"]
    return markdown(columns, rows)


def complete(records: list[Record]) -> bool:
    """Whether all evaluations of a row ran to the end. Rows that lack attacks are not ranked."""
    return all(artefact.stopped is None for record in records for artefact in record.artefacts.values())


def mean(records: list[Record], condition: str) -> float:
    """Return the accuracy in % under a condition that all records have, averaged over seeds."""
    accuracy = cell(records, condition)
    assert accuracy is not None, condition
    return accuracy.mean


def growth(measured: Measured) -> str:
    curves = {title: by_eps(records) for title, records in measured.items() if strong_curves(records)}
    n = next(curve for records in measured.values() for curve in strong_curves(records))[0][2]
    rows = [[title, *(f"{value:.1f}" for value in values.values())] for title, values in curves.items()]
    columns = ["row", *(f"{255 * eps:.3g}/255" for eps in next(iter(curves.values())))]
    heading = f"Strong PGD through the trained surrogate by eps, the first {n} test images:"
    return f"![accuracy against eps]({GROWTH})\n\n{heading}\n\n{markdown(columns, rows)}"


def precisions(measured: Measured) -> str:
    """Show each precision's accuracy, the verdicts that differ from the first precision's, and the gate's verdict."""
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
    refused = [
        f"- {title}, seed {record.seed}, {precision}: {reason}"
        for title, records in measured.items()
        for record in records
        for precision, artefact in record.artefacts.items()
        for reason in artefact.reasons
    ]
    parts = ["## The exported networks", markdown(columns, rows), note, "\n".join(refused)]
    return "\n\n".join(part for part in parts if part)


def flips(first: Sequence[AttackedExport], others: Sequence[AttackedExport], condition: str) -> str:
    pairs = [(a.verdicts(condition), b.verdicts(condition)) for a, b in zip(first, others, strict=True)]
    worse, better = (sum(int((a & ~b).sum()) for a, b in order) for order in (pairs, [(b, a) for a, b in pairs]))
    return f"{worse} / {better}"


def swept(record: Record) -> list[dict[str, Any]]:
    """Return the settings of a row's defences that have a weight eta and an estimator, as MPD-SGR has."""
    return [settings for settings in record.recipe.defence.values() if {"eta", "estimator"} <= settings.keys()]


def lost_by_eta(measured: Measured) -> dict[str, dict[float, float]]:
    """Return the points of clean validation accuracy lost against the baseline, by estimator and eta."""
    lost: dict[str, dict[float, float]] = {}
    for records in measured.values():
        reference = baseline(measured, records)
        if reference is None:
            continue
        for settings in swept(records[0]):
            points = validation_accuracy(reference) - validation_accuracy(records)
            lost.setdefault(settings["estimator"], {})[settings["eta"]] = points
    return lost


def choice(measured: Measured, budget: float) -> str:
    """Show the accuracy that each eta costs, and the largest eta that costs at most `budget` points."""
    lost = lost_by_eta(measured)
    columns = sorted({eta for points in lost.values() for eta in points})
    rows = []
    for name, points in lost.items():
        costs = (f"{points[eta]:+.2f}" if eta in points else "-" for eta in columns)
        within = [eta for eta, cost in points.items() if cost <= budget]
        rows.append([name, *costs, str(max(within, default="-"))])
    return (
        "## The choice of eta\n\nPoints of clean accuracy on the validation split lost against the row without "
        f"MPD-SGR, and the largest eta that loses at most {budget:g}:\n\n"
        + markdown(["estimator", *(f"eta {eta:g}" for eta in columns), "chosen"], rows)
    )


def against_none(measured: Measured) -> str:
    """Show the gain of defences and encodings in fine-tuning over fine-tuning without any; empty without such rows."""
    pairs = {
        title: (records, other)
        for title, records in measured.items()
        if is_defended(records[0]) and (other := undefended(measured, records[0])) is not None
    }
    if not pairs:
        return ""
    first, *_ = next(iter(pairs.values()))[0]
    compared = [record.attacked.conditions for pair in pairs.values() for records in pair for record in records]
    shown = [name for name in first.attacked.conditions if name in HEADINGS or name.split()[0] == PGD]
    common = [name for name in shown if all(name in conditions for conditions in compared)]
    columns = {name: HEADINGS.get(name, name.replace(PGD, "PGD")) for name in common}
    rows = [
        [title, *(str(difference(records, other, name) or NONE_RIGHT) for name in columns)]
        for title, (records, other) in pairs.items()
    ]
    note = (
        "Points of accuracy more than the row that started from the same weights without a defence, paired by image "
        "and seed [95 % interval for the choice of images]. PGD is in the paper's setting; with an eps behind it, its "
        "steps are smaller by the same factor."
    )
    table = markdown(["row", *columns.values()], rows)
    return f"## What a defence or an encoding adds in fine-tuning\n\n{table}\n\n{note}"


def undefended(measured: Measured, record: Record) -> list[Record] | None:
    """Return the row without a defence that started from the same weights as `record`; None if there is none."""
    if record.init is None:
        return None
    from_same_weights = (row for row in measured.values() if row[0].init == record.init and not is_defended(row[0]))
    return next(from_same_weights, None)


def is_defended(record: Record) -> bool:
    """Whether a network has a defence, or an encoding that acts as one by noise or filtering."""
    return bool(record.recipe.defence) or record.recipe.encoding.name not in UNDEFENDED_ENCODINGS
