"""mpdsgr bench BUNDLE: time, memory and energy per image on this machine."""

from collections.abc import Sequence

import click

from mpdsgr_deploy.cli.output import opened_precisions, print_json, print_table
from mpdsgr_deploy.errors import EvaluationError
from mpdsgr_deploy.prediction.cost import Cost, Estimate, estimate, measure_costs

COLUMNS = ("backend", "precision", "batch", "images/s", "ms per batch", "p95 ms", "MiB", "J per image")


def bench_bundle(
    text: str,
    backends: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    *,
    seconds: float,
    total: int | None,
    hours: float,
    as_json: bool,
) -> None:
    """Measure every combination and print a table, or one JSON object, with an estimate for `total` images in `hours`.

    Raises EvaluationError if nothing could be measured.
    """
    bundle, chosen = opened_precisions(text, precisions)
    costs = measure_costs(bundle, backends, chosen, batches, seconds=seconds)
    measured = [cost for cost in costs if not cost.error]
    if not measured:
        raise EvaluationError(f"nothing could be measured: {costs[0].error}")
    best = max(measured, key=lambda cost: cost.images_per_second)
    needed = None if total is None else estimate(best, total, hours)
    if as_json:
        print_json({"costs": [cost._asdict() for cost in costs], "estimate": needed and needed._asdict()})
        return
    print_table(COLUMNS, [_row(cost) for cost in measured], f"{bundle.path}: speed, memory and energy on this machine")
    for cost in costs:
        if cost.error:
            click.echo(f"not measured: {cost.backend} {cost.precision} batch {cost.batch}: {cost.error}")
    if needed is not None:
        click.echo(_sentence(best, needed, hours))


def _row(cost: Cost) -> tuple[str, ...]:
    memory = "-" if cost.memory_mib is None else f"{cost.memory_mib:.0f}"
    joules = "-" if cost.joules is None else f"{cost.joules:.3g}"
    times = (f"{cost.images_per_second:.1f}", f"{cost.latency_ms:.2f}", f"{cost.latency_p95_ms:.2f}")
    return (cost.backend, cost.precision, str(cost.batch), *times, memory, joules)


def _sentence(best: Cost, needed: Estimate, hours: float) -> str:
    return (
        f"{needed.images} images take {needed.hours:.2g} hours on this machine with {best.backend}, {best.precision} "
        f"and batch {best.batch}; to finish them in {hours:g} hours takes {needed.machines} such machines"
    )
