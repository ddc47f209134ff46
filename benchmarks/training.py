"""How fast VGG11 is trained and attacked: this package beside SpikingJelly, snnTorch and a plain loop in torch, the
last also compiled for training.

    python benchmarks/training.py      writes benchmarks/results/training.json and the table of README.md

The paper's network (T = 8, 32x32 images, two hidden layers of 4096), one training step and one PGD-7 a turn. Ours
carries the MPD-SGR regulariser, theirs nothing. Every implementation is a process of its own with the same threads and
the same settings of glibc's malloc. Torch's compiler did not finish SpikingJelly's steps within ten minutes, nor its
attack within seven, so the plain loop alone is compiled, and for training alone. The floor is what this machine's
matrix product and memory reach alone: no network of this size can be faster.
"""

import os
import statistics
from contextlib import ExitStack
from functools import partial
from typing import Any

import click
import harness
import machine
import onnx_ir as ir
from networks import SHAPE, settled
from workers import MALLOC, VERSIONS, worker

from mpdsgr_deploy.diagnostics.operation_counts import macs
from mpdsgr_deploy.exporting.onnx_writer import to_graph
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.recipe import Recipe

NAMES = {
    "ours": "mpdsgr-deploy",
    "spikingjelly": "SpikingJelly",
    "snntorch": "snnTorch",
    "plain": "plain loop",
    "plain-compiled": "plain loop, compiled",
}
OURS, SPIKINGJELLY = "ours", "spikingjelly"
COMPILED = "plain-compiled"
TASKS = ("train", "attack")
PRECISIONS = ("fp32", "bf16")


@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option("--batch", default=16, show_default=True, help="Images a step; of 32, these processes need 25 GB.")
@click.option("--turns", default=5, show_default=True, type=click.IntRange(3), help="Of each.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def run(width: float, T: int, batch: int, turns: int, accelerator: str) -> dict[str, Any]:
    """Time training steps and attacks of all implementations, and what the machine reaches alone."""
    threads = len(os.sched_getaffinity(0))
    floor = {
        "flops_an_image": flops_an_image(width, T),
        "flops_a_second": {p: machine.product_rate(p, accelerator, 4096) for p in PRECISIONS},
        "copy_bytes_a_second": machine.copy_rate(accelerator),
    }
    samples: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name, width, T, threads, accelerator)) for name in NAMES}
        for task in TASKS:
            for precision in PRECISIONS:
                contenders = {
                    name: partial(work, task, batch, precision)
                    for name, work in workers.items()
                    if task == "train" or name != COMPILED
                }
                samples.setdefault(task, {})[precision] = harness.take_turns(contenders, turns)
    setting = {"width": width, "T": T, "batch": batch, "threads": threads, "accelerator": accelerator, "malloc": MALLOC}
    return {
        "setting": setting,
        "samples": samples,
        "floor": floor,
        "versions": VERSIONS,
    }


def flops_an_image(width: float, T: int) -> int:
    """Of one forward pass of VGG11, every step computed: two a multiply-accumulate."""
    recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}})
    network = ir.to_proto(to_graph(simplify(settled(recipe)), SHAPE))
    return 2 * macs(network, T).naive


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting, floor, rows = result["setting"], result["floor"], []
    passes = {"train": 3, "attack": 2 * 7}  # forward, and as much again for each of the gradients in weights and input
    for task, precisions in result["samples"].items():
        for precision, samples in precisions.items():
            seconds, sizes = ({n: [s[k] for s in own] for n, own in samples.items()} for k in ("seconds", "bytes"))
            best = min(seconds.keys() - {OURS}, key=lambda name: statistics.median(seconds[name]))
            for name in samples:
                middle, memory = statistics.median(seconds[name]), statistics.median(sizes[name])
                share = passes[task] * floor["flops_an_image"] * setting["batch"] / middle
                cells = [task, precision, NAMES[name], f"{setting['batch'] / middle:.1f}"]
                cells += [harness.spread(seconds[best], seconds[name]), f"{memory / 1e6:.0f}"]
                cells += [f"{memory / statistics.median(sizes[SPIKINGJELLY]):.2f}"]
                rows.append([*cells, f"{share / floor['flops_a_second'][precision]:.0%}"])
    turns = len(result["samples"]["train"]["fp32"][OURS])
    peaks = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {p}" for p, flops in floor["flops_a_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    header = ["task", "precision", "implementation", "images/s", "times the best peer", "MB", "of SpikingJelly's"]
    return harness.table(
        [*header, "of the peak"],
        rows,
        f"VGG11 at width {setting['width']:g}, T = {setting['T']}, batch {setting['batch']}, {setting['threads']} "
        f"threads, malloc told to keep its pages; {harness.paired(turns)}. Matrix product: {peaks}; "
        f"copy: {floor['copy_bytes_a_second'] / 1e9:.1f} GB/s. {versions}.",
        harness.source(result),
    )


main = harness.command("training", run, render)

if __name__ == "__main__":
    main()
