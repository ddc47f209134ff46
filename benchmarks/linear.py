"""Would VGG11's fully connected layers be faster as 1x1 convolutions? Forward and backward of the larger one.

    python benchmarks/linear.py      writes benchmarks/results/linear.json and the table of benchmarks/README.md

`images`: T * B images of one pixel; `pixels`: one image of T * B pixels. All compute the same products.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import figures
import torch
from torch import Tensor
from torch.nn import functional as F

from mpdsgr_deploy.provenance import provenance

ROWS, INPUTS, OUTPUTS = 256, 8192, 4096  # T = 8 steps of 32 images; the head of VGG11 at 32x32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the network has it."""
    return F.linear(x, weight)


def images(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of as many images as there are rows."""
    return F.conv2d(x[:, :, None, None], weight[:, :, None, None]).flatten(1)


def pixels(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of one image with as many pixels, channels last."""
    return F.conv2d(x.t()[None, :, :, None], weight[:, :, None, None])[0, :, :, 0].t()


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": linear,
    "1x1 convolution, images": images,
    "1x1 convolution, pixels": pixels,
}


@click.command()
@click.option("--turns", default=7, show_default=True, type=click.IntRange(1), help="Of each.")
def main(turns: int) -> None:
    """Measure and publish."""
    result = {
        "threads": torch.get_num_threads(),
        "seconds": {name: measure(dtype, turns) for name, dtype in DTYPES.items()},
        "provenance": provenance(),
    }
    figures.publish("linear", result, render(result))
    click.echo(render(result))


def measure(dtype: torch.dtype, turns: int, shape: tuple[int, int, int] = (ROWS, INPUTS, OUTPUTS)) -> dict[str, Any]:
    """Seconds of each way, [turns] in the order they were taken; one turn before goes uncounted."""
    rows, inputs, outputs = shape
    draw = torch.Generator().manual_seed(0)
    x = (torch.rand(rows, inputs, generator=draw) < 0.1).to(dtype).requires_grad_()  # spikes
    weight = (torch.randn(outputs, inputs, generator=draw) / inputs**0.5).to(dtype).requires_grad_()
    gradient = torch.randn(rows, outputs, generator=draw).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(-1, turns):
        for name, way in WAYS.items():
            started = time.perf_counter()
            torch.autograd.grad(way(x, weight), (x, weight), gradient)
            if turn >= 0:
                seconds[name].append(round(time.perf_counter() - started, 6))
    return seconds


def render(result: dict[str, Any]) -> str:
    """Times and rates as a Markdown table."""
    lines = ["| precision | as | ms | GFLOP/s | times linear |", "|---" * 5 + "|"]
    for precision, found in result["seconds"].items():
        for name, seconds in found.items():
            ratios = [own / other for own, other in zip(seconds, found["linear"], strict=True)]
            middle = statistics.median(seconds)
            rate = 6 * ROWS * INPUTS * OUTPUTS / middle / 1e9
            lines.append(
                f"| {precision} | {name} | {1000 * middle:.0f} | {rate:.0f} | {statistics.median(ratios):.2f} |"
            )
    turns = len(result["seconds"]["fp32"]["linear"])
    note = f"{ROWS} rows, {INPUTS} to {OUTPUTS}; medians of {turns} paired turns, {result['threads']} threads."
    return "\n".join([*lines, "", f"{note} {figures.source(result)}", ""])


if __name__ == "__main__":
    main()
