"""mpdsgr build"""

import time
from collections.abc import Callable
from functools import partial

import click

from mpdsgr_deploy.bundle import Bundle, Prepared
from mpdsgr_deploy.cli.output import json_option, opened_bundle, precision_option, print_json
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tensorrt import BatchSizes, prepare
from mpdsgr_deploy.runtime.tuning import OPENERS, tune

# bundle, precision and the batches wanted (None: the builder's own choice) to what was added to the bundle
Builder = Callable[[Bundle, str, BatchSizes | None], tuple[Bundle, Prepared]]
BUILDERS: dict[str, Builder] = {
    "tensorrt": partial(prepare, "tensorrt"),
    "tensorrt-rtx": partial(prepare, "tensorrt-rtx"),
    **{backend: partial(tune, backend) for backend in OPENERS},
}


@click.command("build")
@click.argument("bundle")
@click.option("--backend", required=True, help=f"What will run the network: {', '.join(BUILDERS)}.")
@precision_option
@click.option("--batch", metavar="MIN,OPT,MAX", help="TensorRT: smallest, best, largest batch.  [default: 1,32,128]")
@json_option
def command(bundle: str, backend: str, precision: str | None, batch: str | None, as_json: bool) -> None:
    """Prepare BUNDLE for a backend and keep the result in it. Run this on the machine that will serve it.

    A TensorRT engine works on this model of GPU with this version of TensorRT. A TensorRT-RTX engine is built without
    a GPU and works on any from compute capability 8.0 on, with this version of TensorRT-RTX. For openvino and
    onnxruntime-cpu it is measured, for some seconds, which number of threads and of images at once is fastest: settings
    for machines with this CPU, as many cores and this version of the backend.

    \b
    Example:
      mpdsgr build bundles/digits --backend tensorrt-rtx --batch 1,8,64
      mpdsgr build bundles/digits --backend openvino --precision int8
    """
    builder = choose("backend", BUILDERS, backend)
    batch_sizes = None if batch is None else parse_batch(batch)
    opened, chosen = opened_bundle(bundle, precision)
    opened.variant(chosen)
    log.info("building %s of %s for %s ...", chosen, opened.path, backend)
    started = time.perf_counter()
    _, prepared = builder(opened, chosen, batch_sizes)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"bundle": str(opened.path), "seconds": round(seconds, 3), **prepared.model_dump()})
        return
    made = f"engine {prepared.file}" if prepared.file else f"settings {prepared.settings}"
    click.echo(f"{made} in {opened.path}, after {seconds:.1f} s")
    report = f"{opened.path}-{backend}"
    click.echo(f"next: mpdsgr validate {opened.path}@{chosen} --backend {backend} --report {report}")


def parse_batch(text: str) -> BatchSizes:
    """MIN,OPT,MAX as three numbers. Raises InputError for anything else."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--batch {text}: write three whole numbers MIN,OPT,MAX, for example 1,32,128")
    smallest, best, largest = map(int, parts)
    return smallest, best, largest
