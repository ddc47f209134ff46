"""mpdsgr build"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from mpdsgr_deploy.bundle import Bundle, Prepared, open_bundle
from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.tuning import OPENERS, tune

# bundle and precision to what was added to the bundle
Builder = Callable[[Bundle, str], tuple[Bundle, Prepared]]
BUILDERS: dict[str, Builder] = {backend: partial(tune, backend) for backend in OPENERS}


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", required=True, help=f"What will run the network: {', '.join(BUILDERS)}.")
@click.option("--precision", default="fp32", show_default=True, help="Which of the bundle's networks.")
@json_option
def command(bundle: Path, backend: str, precision: str, as_json: bool) -> None:
    """Prepare BUNDLE for a backend and keep the result in it. Run this on the machine that will serve it.

    Measures for some seconds which number of threads and of images at once is fastest. The settings are used on
    machines with this CPU, as many cores and this version of the backend; others take the defaults.

    \b
    Example:
      mpdsgr build bundles/digits --backend openvino
    """
    builder = choose("backend", BUILDERS, backend)
    opened = open_bundle(bundle)
    opened.variant(precision)
    log.info("building %s of %s for %s ...", precision, bundle, backend)
    started = time.perf_counter()
    _, prepared = builder(opened, precision)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"bundle": str(bundle), "seconds": round(seconds, 3), **prepared.model_dump()})
        return
    click.echo(f"settings {prepared.settings} in {bundle}, after {seconds:.1f} s")
    click.echo(
        f"next: mpdsgr validate {bundle} --backend {backend} --precision {precision} --report {bundle}-{backend}"
    )
