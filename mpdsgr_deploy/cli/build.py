"""mpdsgr build"""

import time
from collections.abc import Callable
from functools import partial

import click

from mpdsgr_deploy.bundle import Bundle, Prepared
from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.number_list import number_list
from mpdsgr_deploy.cli.output import json_option, opened_bundle, precision_option, print_json
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tensorrt import prepare
from mpdsgr_deploy.runtime.tensorrt.library import LIBRARIES
from mpdsgr_deploy.runtime.tuning import OPENERS, tune

# maps bundle, precision, batch sizes (None: the default) and, for TensorRT-RTX, targets to the new bundle and entry
Builder = Callable[..., tuple[Bundle, Prepared]]
BUILDERS: dict[str, Builder] = {
    **{backend: partial(prepare, backend) for backend in LIBRARIES},
    **{backend: partial(tune, backend) for backend in OPENERS},
}


@click.command("build")
@click.argument("bundle")
@click.option("--backend", required=True, help=f"Runtime to prepare for: {', '.join(BUILDERS)}.")
@precision_option
@click.option(
    "--batch",
    metavar="MIN,OPT,MAX",
    help="For TensorRT: the smallest, the optimal and the largest batch size.  [default: 1,32,128]",
)
@click.option(
    "--target",
    metavar="GPU,...",
    help="For TensorRT-RTX: compute capabilities or names of GPUs, such as 8.9 or l4.  [default: all from 8.0 on]",
)
@json_option
def command(
    bundle: str, backend: str, precision: str | None, batch: str | None, target: str | None, as_json: bool
) -> None:
    """Add an engine or tuned settings for a backend to BUNDLE.

    Run this on the machine that will serve the bundle.

    For tensorrt it builds an engine, which works only on the same model of GPU and with the same version of TensorRT.

    For tensorrt-rtx it builds an engine without a GPU. The engine works with the same version of TensorRT-RTX on the
    GPUs that this version supports. Version 1.7 supports compute capabilities 8.0, 8.6, 8.9, 12.0 and 12.1, and 7.5
    for fp16 if --target names it. It does not support H100 and H200 (9.0), Orin (8.7) or B200 (10.0). Engines of both
    kinds have not run on a GPU yet.

    For openvino and onnxruntime-cpu it measures, in about 20 seconds, which number of threads and which number of
    images per call is fastest. The settings apply to machines with the same CPU, the same number of cores and the same
    version of the backend.

    \b
    Example:
      mpdsgr build bundles/digits --backend tensorrt-rtx --batch 1,8,64
      mpdsgr build bundles/digits --backend openvino --precision int8
    """
    builder = choose("backend", BUILDERS, backend)
    if backend not in LIBRARIES:
        refuse_ignored(f"--backend {backend}", "batch", "target")
    if target is not None:
        builder = partial(builder, targets=target.split(","))
    batch_sizes = None if batch is None else tuple(number_list("--batch", batch, int, "1,32,128", counts=(3, 3)))
    opened, chosen = opened_bundle(bundle, precision)
    opened.variant(chosen)
    log.info("preparing %s of %s for %s ...", chosen, opened.path, backend)
    started = time.perf_counter()
    _, prepared = builder(opened, chosen, batch_sizes)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"bundle": str(opened.path), "seconds": round(seconds, 3), **prepared.model_dump()})
        return
    addition = f"engine {prepared.file}" if prepared.file else f"settings {prepared.settings}"
    click.echo(f"added {addition} to {opened.path} in {seconds:.1f} s")
    report = f"{opened.path}-{backend}"
    click.echo(f"next: mpdsgr validate {opened.path}@{chosen} --backend {backend} --report {report}")
