"""mpdsgr bench"""

import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.number_list import number_list
from mpdsgr_deploy.cli.output import json_option, opened_precisions, print_json, print_table
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.prediction.cost import Cost, estimate, measure_costs
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.serving.load import Load, LoadMeasurement, measure
from mpdsgr_deploy.serving.load.load_measurement import COLUMNS, LEGEND

CONCURRENCY = "1,8,32"
COST_COLUMNS = ("backend", "precision", "batch", "images/s", "ms per batch", "p95 ms", "MiB", "J per image")


@click.command("bench")
@click.argument("bundle", required=False)
@click.option("--url", help="Measure the server at http://HOST:PORT/v2/models/NAME instead of a BUNDLE.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help=f"Runtime of BUNDLE's network; may be repeated.  [default: {DEFAULT_BACKEND}]",
)
@click.option(
    "--precision", "precisions", multiple=True, help="Precision of BUNDLE; may be repeated.  [default: all it has]"
)
@click.option(
    "--total",
    type=click.IntRange(1),
    help="With BUNDLE: also estimate how long this number of images takes, and on how many machines.",
)
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    default=24.0,
    show_default=True,
    help="Hours within which --total images must be finished.",
)
@click.option(
    "--concurrency",
    help="Closed loop: numbers of clients, each of which waits for an answer before its next request.  "
    f"[default: {CONCURRENCY}]",
)
@click.option(
    "--rate",
    help="Open loop: requests per second, sent at random times whether or not earlier ones are answered.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 86400),
    default=10.0,
    show_default=True,
    help="Duration of each measurement.",
)
@click.option(
    "--requests",
    type=click.IntRange(1, 10_000_000),
    default=1_000_000,
    show_default=True,
    help="Largest number of requests in each measurement.",
)
@click.option(
    "--batch",
    "sizes",
    default="1",
    show_default=True,
    help="Images per request; with BUNDLE also several sizes, such as 1,32,256.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help=".npy file with the images to send, [N, C, H, W] of uint8 or float32.  [default: random images]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the random images and of the random times of --rate.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File whose first line is sent as the API key.")
@json_option
def command(
    bundle: str | None,
    url: str | None,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    total: int | None,
    hours: float,
    concurrency: str | None,
    rate: str | None,
    seconds: float,
    requests: int,
    sizes: str,
    images: Path | None,
    seed: int,
    api_key_file: Path | None,
    as_json: bool,
) -> None:
    """Measure the speed of a bundle here, or of a running server.

    With BUNDLE every combination of --backend, --precision and --batch runs for --seconds on this machine. The table
    shows images per second, time per batch, memory and, if the machine reports it, energy. With --total it also shows
    how long that number of images takes and how many machines are needed.

    With --url it measures a server of the Open Inference Protocol (v2), such as `mpdsgr serve` or Triton. Several
    values of --concurrency or of --rate are measured one after another. With --rate the latency of a request counts
    from the time at which it should have been sent, so that a server which falls behind shows it. A dash stands for a
    percentile with too few requests, and for the CPU time of a server that does not report it in /metrics. Before each
    measurement the same load runs for a tenth of the time, at most a second, and is not counted. Ctrl-C prints the
    results so far. For an https server with a private certificate authority set SSL_CERT_FILE.

    \b
    Example:
      mpdsgr bench bundles/digits --backend onnxruntime-cpu --backend openvino --batch 1,32 --total 2000000
      mpdsgr bench --url http://127.0.0.1:8000/v2/models/digits --rate 200 --seconds 30
    """
    batches = number_list("--batch", sizes, int, "1,32,256", low=1, high=65536)
    if (bundle is None) == (url is None):
        raise InputError("give BUNDLE to measure this machine, or --url to measure a server")
    if bundle is not None:
        refuse_ignored("BUNDLE", "concurrency", "rate", "requests", "images", "seed", "api_key_file")
        if total is None:
            refuse_ignored("mpdsgr bench without --total", "hours")
        opened, chosen = opened_precisions(bundle, precisions)
        costs = measure_costs(opened, backends or [DEFAULT_BACKEND], chosen, batches, seconds=seconds)
        _show_costs(costs, opened.path, total, hours, as_json)
        return
    assert url is not None
    refuse_ignored("--url", "backends", "precisions", "total", "hours")
    if images is not None and not rate:
        refuse_ignored("--images without --rate", "seed")
    if len(batches) > 1:
        raise InputError("with --url, give one number of images per request as --batch")
    (batch,) = batches
    if concurrency and rate:
        raise InputError("--concurrency and --rate are two ways of sending requests; give only one of them")
    loads = (
        [Load(seconds, requests, rate=value) for value in number_list("--rate", rate, float, "8", low=1e-3, high=1e5)]
        if rate
        else [
            Load(seconds, requests, concurrency=value)
            for value in number_list("--concurrency", concurrency or CONCURRENCY, int, CONCURRENCY, low=1, high=4096)
        ]
    )
    results, interrupted = LoadMeasurement(), False
    sent_images = None if images is None else _read(images)
    key = None if api_key_file is None else _key(api_key_file)
    try:
        measure(url, loads, results, batch=batch, images=sent_images, seed=seed, key=key)
    except KeyboardInterrupt:
        interrupted = True
    _show_loads(results, url, batch, as_json)
    if interrupted:
        click.echo("interrupted; the figures cover what was measured before", err=True)
        sys.exit(130)


def _show_costs(costs: list[Cost], bundle: Path, total: int | None, hours: float, as_json: bool) -> None:
    """Print the costs, with an estimate for `total` images in `hours`. Raises EvaluationError if none was measured."""
    measured = [cost for cost in costs if not cost.error]
    if not measured:
        raise EvaluationError(f"nothing could be measured: {costs[0].error}")
    best = max(measured, key=lambda cost: cost.images_per_second)
    needed = None if total is None else estimate(best, total, hours)
    if as_json:
        print_json({"costs": [cost._asdict() for cost in costs], "estimate": needed and needed._asdict()})
        return
    print_table(COST_COLUMNS, [_row(cost) for cost in measured], f"{bundle}: speed, memory and energy on this machine")
    for cost in costs:
        if cost.error:
            click.echo(f"not measured: {cost.backend} {cost.precision} batch {cost.batch}: {cost.error}")
    if needed is not None:
        click.echo(
            f"{needed.images} images take {needed.hours:.2g} hours on this machine with {best.backend}, "
            f"{best.precision} and batch {best.batch}; to finish them in {hours:g} hours takes {needed.machines} such "
            "machines"
        )


def _row(cost: Cost) -> tuple[str, ...]:
    memory = "-" if cost.memory_mib is None else f"{cost.memory_mib:.0f}"
    joules = "-" if cost.joules is None else f"{cost.joules:.3g}"
    times = (f"{cost.images_per_second:.1f}", f"{cost.latency_ms:.2f}", f"{cost.latency_p95_ms:.2f}")
    return (cost.backend, cost.precision, str(cost.batch), *times, memory, joules)


def _show_loads(results: LoadMeasurement, url: str, batch: int, as_json: bool) -> None:
    model, outcomes = results.model, results.outcomes
    warnings = [warning for outcome in outcomes for warning in outcome.warnings]
    tensors = None if model is None else "binary" if model.binary else "json"
    if as_json:
        server = None if model is None else model.server
        loads = [outcome.to_json() for outcome in outcomes]
        print_json(
            {"url": url, "server": server, "batch": batch, "tensors": tensors, "loads": loads, "warnings": warnings}
        )
        return
    if model is not None and outcomes:
        kinds = ", ".join(sorted({tensor.datatype for tensor in model.inputs}))
        title = f"{url} ({model.server}), batch {batch}, {kinds}, {tensors} tensors"
        first = "rate" if outcomes[0].load.rate else "users"
        print_table([first, *COLUMNS], [outcome.row() for outcome in outcomes], title)
        click.echo(f"{LEGEND}\nCommands that make the same measurement with Triton's perf_analyzer:")
        for outcome in outcomes:
            click.echo(f"  {outcome.perf_analyzer}")
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


def _read(path: Path) -> NDArray[Any]:
    """Read images [N, C, H, W], uint8 or float32, from an .npy file. Raises InputError for anything else."""
    try:
        images = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an .npy file ({error}); write one with numpy.save") from None
    if not isinstance(images, np.ndarray) or images.ndim != 4 or not len(images):
        raise InputError(f"{path} holds no array of images [N, C, H, W]; write one with numpy.save")
    if images.dtype not in (np.uint8, np.float32):
        raise InputError(f"{path} holds {images.dtype}; convert the images to uint8, or to float32 in [0, 1]")
    return images


def _key(path: Path) -> str:
    """Return the first line of a key file that is neither empty nor a comment. Raises InputError without one."""
    lines = (line.strip() for line in path.read_text().splitlines())
    key = next((line for line in lines if line and not line.startswith("#")), None)
    if key is None:
        raise InputError(f"{path} holds no key; write one on its first line")
    return key
