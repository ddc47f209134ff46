"""What the regulariser costs in memory: bytes that autograd saves for the backward pass, per image and time step.

    python benchmarks/memory.py      writes benchmarks/results/memory.json and the table of benchmarks/README.md

Counted by `torch.autograd.graph.saved_tensors_hooks`: every storage once, parameters and buffers not, since they are
there anyway. The count is exact and the same on every machine; the allocator's peak is above it by what operations need
for a moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import figures
import torch
from torch import Tensor

from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.mpd import empirical, layer_mean, overlap, theorem
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import Trace

STEPS = (4, 8, 16, 32)
BATCH = 2
NETWORKS = {"vgg-small on 8x8 digits": ("vgg-small", (1, 8, 8)), "VGG11 on 32x32 images": ("vgg11", (3, 32, 32))}
ESTIMATORS = {"REG": None, "theorem": theorem, "empirical": empirical}


@click.command()
def main() -> None:
    """Measure and publish."""
    saved = {
        name: {training: {str(T): measure(*network, training, T) for T in STEPS} for training in ESTIMATORS}
        for name, network in NETWORKS.items()
    }
    result = {"batch": BATCH, "bytes_per_image": saved, "provenance": provenance()}
    figures.publish("memory", result, render(result))
    click.echo(render(result))


def measure(model: str, shape: tuple[int, int, int], training: str, T: int, **fields: Any) -> float:
    """Bytes saved per image in the forward pass and loss of a network in training; `fields` are more of its recipe."""
    recipe = Recipe.model_validate({"model": {"name": model, **fields}, "encoding": {"T": T}})
    torch.manual_seed(0)
    net = build_model(recipe, shape, 10).to(memory_format=torch.channels_last)
    traces: list[Trace] = []
    with counted(net) as storages:
        loss = net(torch.rand(BATCH, *shape), traces.append).square().mean()
        estimator = ESTIMATORS[training]
        if estimator is not None:
            loss = loss + layer_mean(traces, estimator, overlap)
    return sum(storages.values()) / BATCH


@contextmanager
def counted(net: SpikingNet) -> Iterator[dict[int, int]]:
    """Collects the size of every storage saved inside, by its address."""
    own = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def render(result: dict[str, Any]) -> str:
    """KiB per image and step as a Markdown table, and how far from linear the growth is."""
    lines = [
        "| network | training | KiB per image and step | "
        + " | ".join(f"T = {T}, MiB per image" for T in STEPS)
        + " |",
        "|---" * (3 + len(STEPS)) + "|",
    ]
    for name, trainings in result["bytes_per_image"].items():
        for training, saved in trainings.items():
            slope = (saved[str(STEPS[-1])] - saved[str(STEPS[0])]) / (STEPS[-1] - STEPS[0])
            cells = [name, training, f"{slope / 2**10:.1f}", *(f"{saved[str(T)] / 2**20:.2f}" for T in STEPS)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"float32, batch {result['batch']}. {figures.source(result)}", ""])


if __name__ == "__main__":
    main()
