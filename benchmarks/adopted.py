"""What it costs to adopt a SpikingJelly VGG11, and an attack step on it beside our own export of that network.

    other/bin/python benchmarks/adopted.py      in the environment of tests/foreign/requirements.txt

Both networks have the same random weights and answer alike: SpikingJelly's is built layer by layer from ours, unrolled
in multi-step mode and exported by `torch.onnx.export`. Adopting is the whole command, as a process of its own, on
images whose labels the network does not give: what is wrong from the start is not attacked, since the cost of attacks
belongs to the tier. What attacks hold in memory is measured apart, in a process that answers and differentiates as
many images at once as an attack takes. A step is one gradient of the cross-entropy through the attack graph.
"""

import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import torch
from networks import CLASSES, SHAPE, settled
from torch import Tensor, nn

from mpdsgr_deploy.attack_graph.attacker import CHUNK, GraphAttacker
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.snn import SpikingLayer
from mpdsgr_deploy.training.module_init import mapped_weights

OURS, ADOPTED = "exported by us", "adopted"
# ru_maxrss of a child includes memory that its parent held when it forked; this value does not
PEAK = """
import atexit
from pathlib import Path

def write_peak():
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    Path("peak").write_text(status["VmHWM"].split()[0])

atexit.register(write_peak)
"""
ADOPT = """
from mpdsgr_deploy.cli import main
main(["adopt", "foreign.onnx", "--images", "images.npz", "--out", "bundle"])
"""
ATTACK = """
import numpy as np
from mpdsgr_deploy.attack_graph.attacker import NetworkFile
from mpdsgr_deploy.runtime import OnnxRuntime

x, y, model = np.random.default_rng(0).random({shape}, np.float32), np.zeros({count}, np.int64), Path("foreign.onnx")
with OnnxRuntime(model) as predictor:
    network = NetworkFile(model, predictor)
    network(x)
    ways = ("superspike:20", "ce"), ("superspike:10", "dlr")
    attackers = [network.attacker(name, loss=loss, draws=1) for name, loss in ways]
    for attacker in attackers:
        attacker(x, y)
"""


class Foreign(nn.Module):
    """Our network, built of SpikingJelly's layers."""

    def __init__(self, model: SpikingNet, T: int) -> None:
        from spikingjelly.activation_based import functional, layer, neuron

        super().__init__()
        parts: list[nn.Module] = []
        for part in model.body:
            if isinstance(part, SpikingLayer):
                own = part.synapse
                if isinstance(own, nn.Conv2d):
                    parts.append(layer.Conv2d(own.in_channels, own.out_channels, 3, padding=1, bias=False))
                    parts.append(layer.BatchNorm2d(own.out_channels))
                else:
                    parts.append(layer.Linear(own.in_features, own.out_features, bias=own.bias is not None))
                    if part.norm is not None:
                        parts.append(layer.BatchNorm1d(own.out_features))
                parts.append(neuron.LIFNode(tau=2.0, decay_input=False, v_reset=None))
            else:
                parts.append(layer.AvgPool2d(2) if isinstance(part, nn.AvgPool2d) else layer.Flatten())
        self.steps, self.T = nn.Sequential(*parts, layer.Linear(model.readout.in_features, CLASSES)), T
        functional.set_step_mode(self, "m")
        self._reset = functional.reset_net

    def forward(self, x: Tensor) -> Tensor:
        self._reset(self.steps)
        return self.steps(x.expand(self.T, *x.shape)).mean(0)


@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default="one a core", type=click.IntRange(1))
@click.option("--turns", default=8, show_default=True, type=click.IntRange(2))
def run(width: float, T: int, batch: int, threads: int, turns: int) -> dict[str, Any]:
    """Adopt a VGG11 of random weights and time attack steps on it."""
    torch.set_num_threads(threads)
    setting = {"width": width, "T": T, "batch": batch, "threads": threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, width, T)
        draw = np.random.default_rng(0)
        x = draw.random((batch, *SHAPE), np.float32)
        y = draw.integers(0, CLASSES, batch)
        settings = RuntimeSettings(threads=threads)
        with (
            GraphAttacker(folder / "ours.onnx", "triangle", settings=settings) as ours,
            GraphAttacker(folder / "foreign.onnx", "triangle", settings=settings) as foreign,
        ):
            both = ours(x, y), foreign(x, y)
            largest = float(np.abs(both[0].gradient).max())
            apart = {
                "logits": float(np.abs(both[0].logits - both[1].logits).max()),
                "gradient, of the largest entry": float(np.abs(both[0].gradient - both[1].gradient).max()) / largest,
            }
            steps = {OURS: partial(ours, x, y), ADOPTED: partial(foreign, x, y)}
            seconds = harness.take_turns({key: partial(harness.timed, call) for key, call in steps.items()}, turns)
        adopting = adopt(folder, threads)
    versions = {package: package_version(package) for package in ("torch", "onnxruntime", "spikingjelly")}
    return {"setting": setting, "adopt": adopting, "apart": apart, "seconds": seconds, "versions": versions}


def write(folder: Path, width: float, T: int) -> None:
    """One network as foreign.onnx and as ours.onnx."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": "vgg11", "width": width},
            "encoding": {"T": T},
            "neuron": {"tau": 0.5, "v_threshold": 1.0, "reset": "soft"},
        }
    )
    model = settled(recipe)
    foreign = Foreign(model, T).eval()
    copy_weights(model, foreign)
    model.load_state_dict(mapped_weights(foreign, model), strict=False)
    x = torch.rand(2, *SHAPE)
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.testing.assert_close(foreign(x), model(x), atol=1e-4, rtol=1e-4)
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            foreign,
            (x,),
            folder / "foreign.onnx",
            dynamo=True,
            dynamic_shapes=(batch,),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
        )
    save(to_graph(simplify(model), SHAPE), folder / "ours.onnx")


def copy_weights(model: SpikingNet, foreign: nn.Module) -> None:
    """Give SpikingJelly's layers the weights and statistics of ours."""
    theirs = [
        part for part in foreign.modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.BatchNorm1d | nn.Linear)
    ]
    ours = [part for layer in model.layers() for part in (layer.synapse, layer.norm) if part is not None]
    for own, their in zip([*ours, model.readout], theirs, strict=True):
        their.load_state_dict({**their.state_dict(), **own.state_dict()}, strict=False)


def adopt(folder: Path, threads: int) -> dict[str, float]:
    """Seconds and peak bytes of `mpdsgr adopt`, on images that are wrong from the start, and of attacks."""
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (32, *SHAPE), dtype=np.uint8)
    from mpdsgr_deploy.runtime import OnnxRuntime

    with OnnxRuntime(folder / "foreign.onnx") as network:
        wrong = network(pixels.astype(np.float32) / 255).argmin(1)
    np.savez(folder / "images.npz", pixels=pixels, classes=wrong, labels=[str(k) for k in range(CLASSES)])
    adopting = alone(ADOPT, folder, threads)
    attacked = alone(ATTACK.format(shape=(CHUNK, *SHAPE), count=CHUNK), folder, threads)
    return {**adopting, "images attacked at once": CHUNK, "peak bytes of attacks": attacked["peak bytes"]}


def alone(code: str, folder: Path, threads: int) -> dict[str, float]:
    """Seconds and peak bytes of Python code in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PEAK + code]
    seconds = harness.timed(lambda: subprocess.run(command, cwd=folder, env=environment, check=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int((folder / "peak").read_text()) * 1024
    return {"seconds": seconds, "processor seconds": round(processor, 1), "peak bytes": peak}


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting, seconds, adopting = result["setting"], result["seconds"], result["adopt"]
    rows = []
    for name in (OURS, ADOPTED):
        ratio = "1" if name == OURS else harness.spread(seconds[name], seconds[OURS])
        rows.append([name, f"{statistics.median(seconds[name]):.2f}", ratio])
    n = len(seconds[OURS])
    apart = result["apart"]
    return harness.table(
        ["network", "s per attack step", "times ours"],
        rows,
        f"`mpdsgr adopt` without attacks: {adopting['seconds']:.0f} s ({adopting['processor seconds']:.0f} s of "
        f"processor time), {adopting['peak bytes'] / 2**20:.0f} MiB at most; attacks on "
        f"{adopting['images attacked at once']} images at once: {adopting['peak bytes of attacks'] / 2**20:.0f} MiB.",
        f"VGG11 at width {setting['width']:g}, T = {setting['T']}, batch {setting['batch']}, {setting['threads']} "
        f"threads; {harness.paired(n)}, on a machine with other "
        f"work. Logits differ by {apart['logits']:.1g} at most, gradients by "
        f"{apart['gradient, of the largest entry']:.1g} of the largest entry: a spike of the "
        "first layer within rounding of the threshold falls differently, and others behind it. "
        f"spikingjelly {result['versions']['spikingjelly']}.",
        harness.source(result),
    )


main = harness.command("adopted", run, render)

if __name__ == "__main__":
    main()
