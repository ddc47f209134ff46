"""What a white-box attack costs: PGD through the attack graph in onnxruntime against PGD through torch, on a CPU.

    python benchmarks/attack.py      writes benchmarks/results/attack.json and the table of benchmarks/README.md

The same network with random weights, the same images, ten steps of PGD, the training surrogate. torch runs eagerly and
computes no gradient of weights, which are frozen. Peak memory is that of a process that only opens one of them and
attacks once.
"""

import multiprocessing
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import torch
from networks import SHAPE, settled

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.protocols import Differentiable
from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.torch_model import TorchModel

EPS, STEPS = 8 / 255, 10
GRAPH, TORCH = "attack graph, onnxruntime", "torch, eager"


@click.option("--model", "models", multiple=True, default=("vgg11", "wrn16-4", "vgg-small"), show_default=True)
@click.option("--width", default=0.5, show_default=True, help="Of every model.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default="one a core", type=click.IntRange(1))
@click.option("--turns", default=5, show_default=True, type=click.IntRange(2))
def run(models: tuple[str, ...], width: float, T: int, batch: int, threads: int, turns: int) -> dict[str, Any]:
    """Time PGD on networks of random weights."""
    setting = {"width": width, "T": T, "batch": batch, "threads": threads, "steps": STEPS}
    measured = {name: measure(name, setting, turns) for name in models}
    versions = {name: package_version(name) for name in ("torch", "onnxruntime")}
    return {"setting": setting, "models": measured, "versions": versions}


def measure(name: str, setting: dict[str, Any], turns: int) -> dict[str, Any]:
    """Seconds of each attack in the order they were taken, peak bytes of each, and how far their gradients differ."""
    torch.set_num_threads(setting["threads"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(to_graph(simplify(network(name, setting)), SHAPE), path)
        context = multiprocessing.get_context("spawn")
        peaks = {}
        for kind in (GRAPH, TORCH):
            with context.Pool(1) as pool:
                peaks[kind] = pool.apply(peak, (kind, name, setting, path))
        targets = {kind: opened(kind, name, setting, path) for kind in (GRAPH, TORCH)}
        x, y = images(setting["batch"])
        gradients = [target(x, y).gradient for target in targets.values()]
        differing = np.abs(gradients[0] - gradients[1]).max((1, 2, 3)) / np.abs(gradients[1]).max((1, 2, 3))
        contenders = {kind: partial(attack, target, setting) for kind, target in targets.items()}
        seconds = harness.take_turns(contenders, turns, warm_up=0)  # the gradients above have warmed up
    return {"seconds": seconds, "peak_bytes": peaks, "median_difference": float(np.median(differing))}


def network(name: str, setting: dict[str, Any]) -> SpikingNet:
    """The torch network, its weights frozen."""
    values = {"model": {"name": name, "width": setting["width"]}, "encoding": {"T": setting["T"]}}
    return settled(Recipe.model_validate(values)).requires_grad_(False)


def opened(kind: str, name: str, setting: dict[str, Any], path: Path) -> Differentiable:
    """What an attack asks for gradients, all images of a batch at once."""
    if kind == TORCH:
        return TorchModel(network(name, setting), SHAPE).attacker()
    return GraphAttacker(path, "triangle", settings=RuntimeSettings(threads=setting["threads"], chunk=setting["batch"]))


def images(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and classes."""
    return np.random.default_rng(0).random((batch, *SHAPE), np.float32), np.arange(batch) % 10


def attack(target: Differentiable, setting: dict[str, Any]) -> float:
    """Seconds of one attack."""
    x, y = images(setting["batch"])
    return harness.timed(lambda: pgd(target, x, y, eps=EPS, step=EPS / 4, steps=setting["steps"]))


def peak(kind: str, name: str, setting: dict[str, Any], path: Path) -> int:
    """Bytes above what the process held before it opened the attacker."""
    torch.set_num_threads(setting["threads"])
    before = high_water()
    attack(opened(kind, name, setting, path), {**setting, "steps": 1})
    return high_water() - before


def high_water() -> int:
    """The most bytes this process has held. Not getrusage, which counts what its parent held before it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting, rows = result["setting"], []
    for name, measured in result["models"].items():
        for kind, seconds in measured["seconds"].items():
            peak_mib = measured["peak_bytes"][kind] / 2**20
            cells = [name, kind, f"{setting['batch'] / statistics.median(seconds):.2f}"]
            cells += [harness.spread(measured["seconds"][TORCH], seconds)]
            rows.append([*cells, f"{peak_mib:.0f}", f"{peak_mib / setting['batch']:.1f}"])
    turns = len(next(iter(result["models"].values()))["seconds"][TORCH])
    return harness.table(
        ["network", "attacker", "images/s", "times torch", "peak MiB", "MiB per image"],
        rows,
        f"PGD of {setting['steps']} steps on {setting['batch']} images of 32x32, networks of width "
        f"{setting['width']:g}, T = {setting['T']}, {setting['threads']} threads; {harness.paired(turns)}; "
        f"weights included in the peak. onnxruntime {result['versions']['onnxruntime']}.",
        harness.source(result),
    )


main = harness.command("attack", run, render)

if __name__ == "__main__":
    main()
