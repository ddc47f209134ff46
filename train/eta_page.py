"""Which eta a sweep recommends: for each estimator the largest that costs little on the validation split."""

from measured import Measured, baseline
from result import Result
from tabular import markdown


def accuracy(results: list[Result]) -> float:
    """On clean validation images after the last epoch, in %: mean over the seeds."""
    return 100 * sum(result.curve[-1]["validation_accuracy"] for result in results) / len(results)


def etas(measured: Measured) -> dict[str, dict[float, float]]:
    """Points of clean validation accuracy that each estimator loses at each eta, against the row without MPD-SGR."""
    lost: dict[str, dict[float, float]] = {}
    for results in measured.values():
        settings, reference = results[0].recipe.defence.get("mpd-sgr"), baseline(measured, results)
        if settings is not None and reference is not None:
            lost.setdefault(settings["estimator"], {})[settings["eta"]] = accuracy(reference) - accuracy(results)
    return lost


def chosen(measured: Measured, budget: float) -> dict[str, float]:
    """The largest eta of each estimator that loses at most `budget` points; an estimator without one is left out."""
    within = {name: [eta for eta, points in lost.items() if points <= budget] for name, lost in etas(measured).items()}
    return {name: max(found) for name, found in within.items() if found}


def choice(measured: Measured, budget: float) -> str:
    """The section of the page."""
    found, lost = chosen(measured, budget), etas(measured)
    columns = sorted({eta for points in lost.values() for eta in points})
    rows = [
        [name, *(f"{points[eta]:+.2f}" if eta in points else "-" for eta in columns), f"{found.get(name, '-')}"]
        for name, points in lost.items()
    ]
    return (
        "## The choice of eta\n\nPoints of clean accuracy on the validation split lost against the row without "
        f"MPD-SGR, and the largest eta that loses at most {budget:g}:\n\n"
        + markdown(["estimator", *(f"eta {eta:g}" for eta in columns), "chosen"], rows)
    )
