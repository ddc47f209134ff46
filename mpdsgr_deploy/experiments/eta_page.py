"""Choose eta from a sweep: for each estimator the largest that costs little on the validation split."""

from typing import Any

from mpdsgr_deploy.experiments.compare import baseline
from mpdsgr_deploy.experiments.page_parts import markdown
from mpdsgr_deploy.experiments.records import Measured, Record


def validation_accuracy(records: list[Record]) -> float:
    """Return accuracy on clean validation images after the last epoch, in %, averaged over seeds."""
    return 100 * sum(record.curve["validation_accuracy"][-1] for record in records) / len(records)


def swept(record: Record) -> list[dict[str, Any]]:
    """Return the settings of a row's defences that have a weight eta: MPD-SGR, and those of other packages."""
    return [settings for settings in record.recipe.defence.values() if {"eta", "estimator"} <= settings.keys()]


def lost_by_eta(measured: Measured) -> dict[str, dict[float, float]]:
    """Return the points of clean validation accuracy that each estimator loses at each eta against its baseline."""
    lost: dict[str, dict[float, float]] = {}
    for records in measured.values():
        reference = baseline(measured, records)
        if reference is None:
            continue
        for settings in swept(records[0]):
            points = validation_accuracy(reference) - validation_accuracy(records)
            lost.setdefault(settings["estimator"], {})[settings["eta"]] = points
    return lost


def chosen(measured: Measured, budget: float) -> dict[str, float]:
    """Return the largest eta of each estimator that loses at most `budget` points, if it has one."""
    lost = lost_by_eta(measured)
    within = {name: [eta for eta, cost in points.items() if cost <= budget] for name, points in lost.items()}
    return {name: max(etas) for name, etas in within.items() if etas}


def choice(measured: Measured, budget: float) -> str:
    recommended, lost = chosen(measured, budget), lost_by_eta(measured)
    columns = sorted({eta for points in lost.values() for eta in points})
    rows = [
        [name, *(f"{points[eta]:+.2f}" if eta in points else "-" for eta in columns), f"{recommended.get(name, '-')}"]
        for name, points in lost.items()
    ]
    return (
        "## The choice of eta\n\nPoints of clean accuracy on the validation split lost against the row without "
        f"MPD-SGR, and the largest eta that loses at most {budget:g}:\n\n"
        + markdown(["estimator", *(f"eta {eta:g}" for eta in columns), "chosen"], rows)
    )
