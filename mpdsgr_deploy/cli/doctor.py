"""mpdsgr doctor"""

import re
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import requires
from tempfile import TemporaryDirectory

import click

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.cli.output import json_option, opened_precisions, print_json, print_table
from mpdsgr_deploy.errors import MpdsgrError, one_line
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.provenance import package_version, provenance
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import BACKENDS, open_predictor
from mpdsgr_deploy.runtime.tensorrt import prepare
from mpdsgr_deploy.runtime.tensorrt.library import LIBRARIES

# The parts that have never run on a GPU, how they are tested without one, and the step of benchmarks/gpu.py for each
UNPROVED = (
    ("Triton kernels of the LIF neuron", "in Triton's interpreter, and compiled for sm_90", "kernels"),
    ("onnxruntime-cuda, its plug-in", "choice of provider and error messages, with a fake library", "providers"),
    ("verdicts on a GPU equal those on a CPU", "not at all", "providers"),
    ("attack graph on CUDA", "on onnxruntime's CPU provider", "attack"),
    ("training on GPUs, several of them, several nodes", "on CPUs, as processes on one machine", "training"),
    ("CIFAR-10 at the paper's size", "small networks on a CPU", "cifar10"),
    ("tensorrt, onnxruntime-tensorrt", "not at all, because the library needs a GPU", "inference"),
    ("tensorrt-rtx", "engines are built, and a fake driver records the CUDA calls", "inference"),
)


@click.command("doctor")
@click.argument("bundle", required=False)
@json_option
def command(bundle: str | None, as_json: bool) -> None:
    """Show what is installed and which backends work on this machine.

    A backend works if it gives the stored answers to a golden batch, a few images whose logits are known. Without
    BUNDLE the command uses a small spiking network of this package, and builds TensorRT engines for it. With BUNDLE it
    uses that bundle's networks, and only the engines that are already in it. The backend torch-compile takes some time.
    A last table lists the parts of this package that have never run on a GPU.

    \b
    Example:
      mpdsgr doctor
      mpdsgr doctor bundles/digits
    """
    with TemporaryDirectory() as folder:
        # a copy, to which engines can be added
        small = shutil.copytree(shipped("export") / "doctor" / "bundle", f"{folder}/bundle")
        opened, precisions = opened_precisions(bundle or small)
        pairs = [(backend, precision) for backend in BACKENDS for precision in precisions]
        states = {pair: state(opened, *pair, build=bundle is None) for pair in track(pairs, "trying backends")}
    packages = {extra: {name: package_version(name) for name in names} for extra, names in extras().items()}
    machine = provenance()
    if as_json:
        backends = {name: {p: states[name, p] for p in precisions} for name in BACKENDS}
        unproved = [dict(zip(("what", "tested", "step"), row, strict=True)) for row in UNPROVED]
        print_json({"backends": backends, "extras": packages, "unproved_on_a_gpu": unproved, **machine})
        return
    print_table(("backend", "precision", "state"), grouped(states), "Backends")
    rows = [
        (f"[{e}]", ", ".join(f"{n} {v or 'missing'}" for n, v in versions.items())) for e, versions in packages.items()
    ]
    print_table(("extra", "packages"), rows, "Packages")
    hardware = ", ".join(f"{name} {value}" for name, value in machine["hardware"].items())
    print_table(
        ("never run on a GPU", "tested without one", "benchmarks/gpu.py --step"), UNPROVED, "Not tested on a GPU yet"
    )
    click.echo(f"mpdsgr-deploy {machine['mpdsgr_deploy']}, Python {machine['python']}, {hardware}")


def extras() -> dict[str, list[str]]:
    """Return the packages that each extra of this package installs, but for those of its developers."""
    packages: dict[str, list[str]] = {}
    for requirement in requires("mpdsgr-deploy") or ():
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name and extra and extra[1] != "dev":
            packages.setdefault(extra[1], []).append(name[0])
    return packages


def grouped(states: Mapping[tuple[str, str], str]) -> list[tuple[str, str, str]]:
    """Return rows (backend, precisions, state), one per backend and state, from states by (backend, precision)."""
    precisions: dict[tuple[str, str], list[str]] = {}
    for (backend, precision), state in states.items():
        precisions.setdefault((backend, state), []).append(precision)
    return [(backend, ", ".join(names), state) for (backend, state), names in precisions.items()]


def state(bundle: Bundle, backend: str, precision: str, *, build: bool = False) -> str:
    """Return 'works' with the speed on the golden batch, or 'no' with the reason. build: build an engine first."""
    try:
        if build and backend in LIBRARIES:
            bundle, _ = prepare(backend, bundle, precision)
        # raises if the golden batch is not answered correctly
        with open_predictor(bundle, backend, precision) as predictor:
            inputs, _ = bundle.golden()
            started = time.perf_counter()
            predictor(inputs)
            return f"works, {len(inputs) / (time.perf_counter() - started):.0f} images/s in batches of {len(inputs)}"
    except MpdsgrError as error:
        return f"no: {error}"
    except Exception as error:  # a half-installed library may raise any type, and its message helps the user
        return f"no: {type(error).__name__}: {one_line(error)}"
