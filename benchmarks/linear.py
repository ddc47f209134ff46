"""Would VGG11's fully connected layers be faster as 1x1 convolutions? Forward and backward of the larger one.

    python benchmarks/linear.py      writes benchmarks/results/linear.json and the table of benchmarks/README.md

`images`: T * B images of one pixel; `pixels`: one image of T * B pixels. All compute the same products.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import harness
import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, INPUTS, OUTPUTS = 256, 8192, 4096  # T = 8 steps of 32 images; the head of VGG11 at 32x32
Way = Callable[[Tensor, Tensor], Tensor]
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


WAYS: dict[str, Way] = {
    "linear": linear,
    "1x1 convolution, images": images,
    "1x1 convolution, pixels": pixels,
}


@click.option("--turns", default=7, show_default=True, type=click.IntRange(1), help="Of each.")
def run(turns: int) -> dict[str, Any]:
    """Time the larger hidden layer of VGG11's head, three ways."""
    seconds = {name: measure(dtype, turns) for name, dtype in DTYPES.items()}
    return {"threads": torch.get_num_threads(), "seconds": seconds}


def measure(dtype: torch.dtype, turns: int, shape: tuple[int, int, int] = (ROWS, INPUTS, OUTPUTS)) -> dict[str, Any]:
    """Seconds of each way, [turns] in the order they were taken."""
    rows, inputs, outputs = shape
    draw = torch.Generator().manual_seed(0)
    x = (torch.rand(rows, inputs, generator=draw) < 0.1).to(dtype).requires_grad_()  # spikes
    weight = (torch.randn(outputs, inputs, generator=draw) / inputs**0.5).to(dtype).requires_grad_()
    gradient = torch.randn(rows, outputs, generator=draw).to(dtype)

    def seconds(way: Way) -> float:
        return harness.timed(lambda: torch.autograd.grad(way(x, weight), (x, weight), gradient))

    return harness.take_turns({name: partial(seconds, way) for name, way in WAYS.items()}, turns)


def render(result: dict[str, Any]) -> str:
    """Times and rates as a Markdown table."""
    rows = []
    for precision, samples in result["seconds"].items():
        for name, seconds in samples.items():
            middle = statistics.median(seconds)
            rate = 6 * ROWS * INPUTS * OUTPUTS / middle / 1e9
            ratio = harness.spread(seconds, samples["linear"])
            rows.append([precision, name, f"{1000 * middle:.0f}", f"{rate:.0f}", ratio])
    turns = len(result["seconds"]["fp32"]["linear"])
    note = f"{ROWS} rows, {INPUTS} to {OUTPUTS}; {harness.paired(turns)}, {result['threads']} threads."
    return harness.table(["precision", "as", "ms", "GFLOP/s", "times linear"], rows, f"{note} {harness.source(result)}")


main = harness.command("linear", run, render)

if __name__ == "__main__":
    main()
