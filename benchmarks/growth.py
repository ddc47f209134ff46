"""How the time and memory of a training step grow with T, with the batch and with the network's width.

    python benchmarks/growth.py      writes benchmarks/results/growth.json and the table of benchmarks/README.md

One setting is varied at a time, doubling it; all settings live in one process and take turns. The exponent is the slope
of the least-squares line through the logarithms: 1 is proportional growth. A convolution's work grows with the square
of the width, what it keeps for the backward pass with the width itself. Weights and what a step costs before it does
anything keep exponents below that.
"""

import math
import statistics
from typing import Any

import click
import figures
import memory
import step
import torch

from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.provenance import provenance

BASE = {"T": 8, "batch": 16, "width": 0.5}
VARIED: dict[str, tuple[float, ...]] = {"T": (4, 8, 16, 32), "batch": (8, 16, 32, 64), "width": (0.25, 0.5, 1, 2)}
MODEL, TRAINING = "vgg-small", "empirical"
BOUNDS = {"T": (1, 1), "batch": (1, 1), "width": (2, 1)}  # exponents of time and of memory not to be exceeded


@click.command()
@click.option("--turns", default=7, show_default=True, type=click.IntRange(1), help="Of each setting.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(turns: int, accelerator: str) -> None:
    """Measure and publish."""
    result = {
        "accelerator": accelerator,
        "threads": torch.get_num_threads(),
        "seconds": {name: measure(name, turns, accelerator) for name in VARIED},
        "kept": {name: {str(value): kept(name, value) for value in values} for name, values in VARIED.items()},
        "provenance": provenance(),
    }
    figures.publish("growth", result, render(result))
    click.echo(render(result))


def measure(name: str, turns: int, accelerator: str) -> dict[str, list[float]]:
    """Seconds of a training step at every value of what is varied, [turns] in the order they were taken."""
    settings = {str(value): {**BASE, name: value, "accelerator": accelerator} for value in VARIED[name]}
    defence = step.VARIANTS["empirical, overlap"]
    learners = {value: step.learner(s, "32-true", defence, MODEL) for value, s in settings.items()}
    draw = generator(0, "benchmark")
    seconds: dict[str, list[float]] = {value: [] for value in settings}
    values = list(settings)
    for turn in range(-1, turns):  # one to warm up
        for value in values[turn % len(values) :] + values[: turn % len(values)]:
            batch = int(settings[value]["batch"])
            pixels = torch.randint(256, (batch, *step.SHAPE), dtype=torch.uint8, generator=draw)
            y = torch.randint(step.CLASSES, (batch,), generator=draw)
            taken = step.timed_step(learners[value], pixels, y)
            if turn >= 0:
                seconds[value].append(round(taken, 6))
    return seconds


def kept(name: str, value: float) -> int:
    """Bytes that a step keeps for its backward pass; counted, not timed."""
    setting = {**BASE, name: value}
    counted = memory.measure(
        MODEL, step.SHAPE, TRAINING, int(setting["T"]), "none", int(setting["batch"]), width=setting["width"]
    )
    return counted["kept"]


def exponent(found: dict[str, float]) -> float:
    """Slope of log(y) over log(x) by least squares, for {x: y}."""
    points = [(math.log(float(x)), math.log(y)) for x, y in found.items()]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def render(result: dict[str, Any]) -> str:
    """Exponents and what they come from as a Markdown table."""
    lines = ["| varied | values | ms a step | exponent | MB kept | exponent | not above |", "|---" * 7 + "|"]
    for name, found in result["seconds"].items():
        seconds = {value: statistics.median(taken) for value, taken in found.items()}
        counted = result["kept"][name]
        cells = [
            name,
            ", ".join(seconds),
            ", ".join(f"{1000 * s:.0f}" for s in seconds.values()),
            f"{exponent(seconds):.2f}",
            ", ".join(f"{value / 1e6:.0f}" for value in counted.values()),
            f"{exponent(counted):.2f}",
            " and ".join(map(str, BOUNDS[name])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    base = ", ".join(f"{name} {value:g}" for name, value in BASE.items())
    turns = len(next(iter(result["seconds"]["T"].values())))
    note = (
        f"{MODEL} on 32x32 images with the empirical regulariser, float32; what is not varied is {base}; medians of "
        f"{turns} turns, {result['threads']} threads. {figures.source(result)}"
    )
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main()
