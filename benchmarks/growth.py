"""How the time and memory of a training step grow with T, with the batch and with the network's width.

    python benchmarks/growth.py      writes benchmarks/results/growth.json and the table of benchmarks/README.md

One setting is varied at a time, doubling it; all settings live in one process and take turns. The exponent is the slope
of the least-squares line through the logarithms: 1 is proportional growth. A convolution's work grows with the square
of the width, what it keeps for the backward pass with the width itself. Weights and what a step costs before it does
anything keep exponents below that.
"""

import math
import statistics
from functools import partial
from typing import Any

import click
import harness
import memory
import step
import torch
from networks import CLASSES, SHAPE

from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.training.epoch import Learner

BASE = {"T": 8, "batch": 16, "width": 0.5}
VARIED: dict[str, tuple[float, ...]] = {"T": (4, 8, 16, 32), "batch": (8, 16, 32, 64), "width": (0.25, 0.5, 1, 2)}
MODEL, TRAINING = "vgg-small", "empirical"
BOUNDS = {"T": (1, 1), "batch": (1, 1), "width": (2, 1)}  # exponents of time and of memory not to be exceeded


@click.option("--turns", default=7, show_default=True, type=click.IntRange(1), help="Of each setting.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def run(turns: int, accelerator: str) -> dict[str, Any]:
    """Time and count training steps at doubled T, batch and width."""
    return {
        "accelerator": accelerator,
        "threads": torch.get_num_threads(),
        "seconds": {name: measure(name, turns, accelerator) for name in VARIED},
        "kept": {name: {str(value): kept(name, value) for value in values} for name, values in VARIED.items()},
    }


def measure(name: str, turns: int, accelerator: str) -> dict[str, list[float]]:
    """Seconds of a training step at every value of what is varied, [turns] in the order they were taken."""
    settings = {str(value): {**BASE, name: value, "accelerator": accelerator} for value in VARIED[name]}
    defence = step.VARIANTS["empirical, overlap"]
    learners = {value: step.learner(s, "32-true", defence, MODEL) for value, s in settings.items()}
    draw = generator(0, "benchmark")

    def seconds(learner: Learner, batch: int) -> float:
        pixels = torch.randint(256, (batch, *SHAPE), dtype=torch.uint8, generator=draw)
        y = torch.randint(CLASSES, (batch,), generator=draw)
        return step.timed_step(learner, pixels, y)

    contenders = {value: partial(seconds, learners[value], int(s["batch"])) for value, s in settings.items()}
    return harness.take_turns(contenders, turns)


def kept(name: str, value: float) -> int:
    """Bytes that a step keeps for its backward pass; counted, not timed."""
    setting = {**BASE, name: value}
    counted = memory.measure(
        MODEL, SHAPE, TRAINING, int(setting["T"]), "none", int(setting["batch"]), width=setting["width"]
    )
    return counted["kept"]


def exponent(measured: dict[str, float]) -> float:
    """Slope of log(y) over log(x) by least squares, for {x: y}."""
    points = [(math.log(float(x)), math.log(y)) for x, y in measured.items()]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def render(result: dict[str, Any]) -> str:
    """Exponents and what they come from as a Markdown table."""
    rows = []
    for name, samples in result["seconds"].items():
        seconds, counted = {v: statistics.median(s) for v, s in samples.items()}, result["kept"][name]
        times, sizes = (f"{1000 * s:.0f}" for s in seconds.values()), (f"{n / 1e6:.0f}" for n in counted.values())
        cells = [name, ", ".join(seconds), ", ".join(times), f"{exponent(seconds):.2f}"]
        rows.append([*cells, ", ".join(sizes), f"{exponent(counted):.2f}", " and ".join(map(str, BOUNDS[name]))])
    base = ", ".join(f"{name} {value:g}" for name, value in BASE.items())
    turns = len(next(iter(result["seconds"]["T"].values())))
    return harness.table(
        ["varied", "values", "ms a step", "exponent", "MB kept", "exponent", "not above"],
        rows,
        f"{MODEL} on 32x32 images with the empirical regulariser, float32; what is not varied is {base}; medians of "
        f"{turns} turns, {result['threads']} threads. {harness.source(result)}",
    )


main = harness.command("growth", run, render)

if __name__ == "__main__":
    main()
