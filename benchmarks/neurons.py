"""What a layer of LIF neurons costs in training: all steps as one function, beside a plain loop, each also compiled.

    python benchmarks/neurons.py      writes benchmarks/results/neurons.json and the table of benchmarks/README.md

Forward and backward of one layer, on the currents of VGG11's first convolution. The loop is that of `peers`, as anybody
would write it. `compiling` is what the first call takes beside the others, after torch has loaded its compiler: of the
loop once for every shape of a network, of the one function once for all.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import harness
import torch
from torch import Tensor

from mpdsgr_deploy.snn import compiled, make_surrogate
from mpdsgr_deploy.snn.lif_state import LIFConstants
from mpdsgr_deploy.snn.multistep import multistep_lif

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from plain_vgg11 import Neurons

Layer = Callable[[Tensor], Tensor]
SURROGATE, TAU, V_THRESHOLD = make_surrogate("triangle"), 0.5, 1.0  # the loop's
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE, LOOP, COMPILED = "one function", "plain loop", ", compiled"
NEVER = 1 << 60  # elements, below which the one function is not compiled
HEIGHT, CHANNELS = 32, 64


def as_one(current: Tensor) -> Tensor:
    """Spikes [T, B, C, H, W] of the currents, as networks of this package train."""
    return multistep_lif(current, None, LIFConstants(len(current), TAU, V_THRESHOLD, True, SURROGATE))[1]


@click.option("--width", default=0.25, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=4, show_default=True, help="Time steps T.")
@click.option("--batch", default=32, show_default=True, help="Images a step.")
@click.option("--turns", default=40, show_default=True, type=click.IntRange(1), help="Of each implementation.")
def run(width: float, T: int, batch: int, turns: int) -> dict[str, Any]:
    """Time forward and backward of one layer."""
    shape = (T, batch, round(CHANNELS * width), HEIGHT, HEIGHT)
    torch.compile(torch.abs)(torch.ones(1))  # loads torch's compiler
    measured = {name: measure(shape, dtype, turns) for name, dtype in PRECISIONS.items()}
    return {"shape": shape, "threads": torch.get_num_threads(), "precisions": measured}


def measure(shape: tuple[int, ...], dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """Seconds of each implementation's turns, the bytes that it keeps, and the seconds of its first call."""
    draw = torch.Generator().manual_seed(0)
    current, gradient = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    current.requires_grad_()
    loop = torch.compile(Neurons(), dynamic=False)
    layers: dict[str, Layer] = {ONE: as_one, ONE + COMPILED: as_one, LOOP: Neurons(), LOOP + COMPILED: loop}

    def step(name: str) -> None:
        with patch.multiple(compiled, PAYS=0, FEWEST=NEVER if name == ONE else compiled.FEWEST):
            layers[name](current).backward(gradient)
        current.grad = None

    contenders = {name: partial(harness.timed, partial(step, name)) for name in layers}
    return {
        "first": {name: call() for name, call in contenders.items()},
        "kept": {name: kept(layer, current) for name, layer in layers.items()},
        "seconds": harness.take_turns(contenders, turns),
    }


def kept(layer: Layer, current: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass; of the currents too, where it needs them."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        spikes = layer(current)
    del spikes
    return sum(sizes.values())


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    rows = []
    for precision, found in result["precisions"].items():
        for name, seconds in found["seconds"].items():
            ratio = harness.spread(found["seconds"][LOOP], seconds)
            compiling = f"{found['first'][name]:.0f}" if name.endswith(COMPILED) else ""
            cells = f"{1000 * statistics.median(seconds):.1f}", ratio, f"{found['kept'][name] / 1e6:.1f}", compiling
            rows.append((precision, name, *cells))
    T, batch, channels, height, width = result["shape"]
    n = len(next(iter(result["precisions"].values()))["seconds"][ONE])
    return harness.table(
        ["precision", "neurons", "ms", "times the loop", "MB kept", "s to compile"],
        rows,
        f"T = {T}, batch {batch}, {channels} channels of {height}x{width}, triangle, hard reset, {result['threads']} "
        f"threads; {harness.paired(n)}.",
        harness.source(result),
    )


main = harness.command("neurons", run, render)

if __name__ == "__main__":
    main()
