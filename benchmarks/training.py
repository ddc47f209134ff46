"""How fast VGG11 is trained and attacked: this package beside SpikingJelly, snnTorch and a plain loop in torch.

    python benchmarks/training.py      writes benchmarks/results/training.json, a plot and the table of README.md

The paper's network (T = 8, 32x32 images, two hidden layers of 4096), one training step and one PGD-7 a turn. Ours
carries the MPD-SGR regulariser, theirs nothing. Every implementation is a process of its own with the same threads and
the same settings of glibc's malloc; they take turns in an order that rotates, so that a busy machine disturbs them
alike. The floor is what this machine's matrix product and memory reach alone: no network of this size can be faster.
"""

import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import figures
import onnx_ir as ir
import torch
from matplotlib.figure import Figure
from networks import SHAPE, settled
from workers import MALLOC, PACKAGES, Worker, worker

from mpdsgr_deploy.diagnostics.cost import macs
from mpdsgr_deploy.exporting.onnx_writer import to_graph
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe

NAMES = {"ours": "mpdsgr-deploy", "spikingjelly": "SpikingJelly", "snntorch": "snnTorch", "plain": "plain loop"}
TASKS = {"train": "training step", "attack": "PGD-7"}
REFERENCE = "spikingjelly"
PRECISIONS = ("fp32", "bf16")


@click.command()
@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option("--batch", default=32, show_default=True, help="Images a step.")
@click.option("--turns", default=5, show_default=True, type=click.IntRange(3), help="Of each.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(width: float, T: int, batch: int, turns: int, accelerator: str) -> None:
    """Measure and publish."""
    threads = len(os.sched_getaffinity(0))
    floor = {
        "flops_an_image": flops_an_image(width, T),
        "flops_a_second": {p: product(p, accelerator) for p in PRECISIONS},
        "copy_bytes_a_second": copy(accelerator),
    }
    samples: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name, width, T, threads, accelerator)) for name in NAMES}
        for task in TASKS:
            samples[task] = {p: take_turns(workers, task, batch, p, turns) for p in PRECISIONS}
    setting = {"width": width, "T": T, "batch": batch, "threads": threads, "accelerator": accelerator, "malloc": MALLOC}
    result = {
        "setting": setting,
        "samples": samples,
        "floor": floor,
        "versions": dict(package.split("==") for package in PACKAGES if "==" in package),
        "provenance": provenance(),
    }
    plot(result, figures.FOLDER / "results" / "training.svg")
    figures.publish("training", result, render(result))
    click.echo(render(result))


def take_turns(
    workers: dict[str, Worker], task: str, batch: int, precision: str, turns: int
) -> dict[str, list[dict[str, float]]]:
    """Samples of each in the order they were taken; one turn before goes uncounted."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(-1, turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sample = workers[name](task, batch, precision)
            if turn >= 0:
                samples[name].append(sample)
    return samples


def flops_an_image(width: float, T: int) -> int:
    """Of one forward pass of VGG11, every step computed: two a multiply-accumulate."""
    recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}})
    network = ir.to_proto(to_graph(simplify(settled(recipe)), SHAPE))
    return 2 * macs(network, T).naive


def product(precision: str, accelerator: str, size: int = 4096) -> float:
    """The most operations a second of a square matrix product."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.rand(size, size, dtype=dtype, device=accelerator) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, accelerator)


def copy(accelerator: str) -> float:
    """The most bytes a second that a copy reads and writes."""
    source = torch.rand(1 << 26, device=accelerator)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), accelerator)


def fastest(call: Any, accelerator: str, turns: int = 5) -> float:
    """Seconds of the quickest of some calls."""
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        call()
        if accelerator == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def plot(result: dict[str, Any], path: Path) -> None:
    """Images a second of every implementation, a panel a task."""
    drawing, batch = Figure(figsize=(9, 2.6), layout="constrained"), result["setting"]["batch"]
    axes = drawing.subplots(1, len(TASKS))
    for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
        for row, samples in enumerate(result["samples"][task].values()):
            for column, name in enumerate(NAMES):
                rates = sorted(batch / sample["seconds"] for sample in samples[name])
                middle = statistics.median(rates)
                spread = [[middle - rates[0]], [rates[-1] - middle]]
                label = None if row else NAMES[name]
                axis.barh(row + 0.2 * column, middle, 0.18, xerr=spread, color=f"C{column}", label=label)
        axis.set(yticks=[0.3, 1.3], yticklabels=PRECISIONS, xlabel="images/s", title=title)
        axis.invert_yaxis()
    axes[0].legend(fontsize="small")
    drawing.savefig(path)


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting, floor = result["setting"], result["floor"]
    lines = [
        "| task | precision | implementation | images/s | times SpikingJelly | MB | of SpikingJelly's | of the peak |",
        "|---" * 8 + "|",
    ]
    passes = {"train": 3, "attack": 2 * 7}  # forward, and as much again for each of the gradients in weights and input
    for task, precisions in result["samples"].items():
        for precision, samples in precisions.items():
            for name, taken in samples.items():
                seconds = [sample["seconds"] for sample in taken]
                others = [sample["seconds"] for sample in samples[REFERENCE]]
                ratios = sorted(other / own for own, other in zip(seconds, others, strict=True))
                middle = statistics.median(seconds)
                memory, other = (statistics.median(s["bytes"] for s in samples[n]) for n in (name, REFERENCE))
                share = passes[task] * floor["flops_an_image"] * setting["batch"] / middle
                cells = [
                    *(task, precision, NAMES[name], f"{setting['batch'] / middle:.1f}"),
                    f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
                    *(f"{memory / 1e6:.0f}", f"{memory / other:.2f}"),
                    f"{share / floor['flops_a_second'][precision]:.0%}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    turns = len(result["samples"]["train"]["fp32"][REFERENCE])
    peaks = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {p}" for p, flops in floor["flops_a_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"VGG11 at width {setting['width']:g}, T = {setting['T']}, batch {setting['batch']}, {setting['threads']} "
            f"threads, malloc told to keep its pages; medians [least, most] of {turns} paired turns. Matrix product: "
            f"{peaks}; copy: {floor['copy_bytes_a_second'] / 1e9:.1f} GB/s. {versions}.",
            figures.source(result),
            "",
        ]
    )


if __name__ == "__main__":
    main()
