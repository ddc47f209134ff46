"""What a training step takes in memory: bytes alive after the forward pass and loss, per image and time step.

    python benchmarks/memory.py      writes benchmarks/results/memory.json and the table of benchmarks/README.md

Counted by torch's dispatcher on tensors without data (see `live`): exact, and the same on every machine, for a batch
that this machine need not hold. Weights, gradients and the optimiser's buffers are not in it, for they are there
anyway; what a kernel needs for a moment is not seen. `largest.py` has the operating system measure one step.
"""

from typing import Any

import harness
import torch
from live import Live

from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import Reader

STEPS = (4, 8, 16, 32)
BATCH = 128
NETWORKS = {"vgg-small on 8x8 digits": ("vgg-small", (1, 8, 8)), "VGG11 on 32x32 images": ("vgg11", (3, 32, 32))}
DEFENCES: dict[str, dict[str, dict[str, str]]] = {
    "REG": {},
    "theorem": {"mpd-sgr": {"estimator": "theorem"}},
    "empirical": {"mpd-sgr": {"estimator": "empirical"}},
}
RECOMPUTE = ("none", "layers")


def run() -> dict[str, Any]:
    """Count the bytes of training steps."""
    counted = {
        name: {
            training: {r: {str(T): measure(*network, training, T, r) for T in STEPS} for r in RECOMPUTE}
            for training in DEFENCES
        }
        for name, network in NETWORKS.items()
    }
    return {"batch": BATCH, "bytes": counted}


def measure(
    model: str, shape: tuple[int, int, int], training: str, T: int, recompute: str, batch: int = BATCH, **fields: Any
) -> dict[str, int]:
    """`kept` between forward and backward pass, and the `peak` of both, in bytes; `fields` are more of the model's."""
    values = {"model": {"name": model, **fields}, "encoding": {"T": T}, "defence": DEFENCES[training]}
    return step(Recipe.model_validate({**values, "training": {"recompute": recompute}}), shape, batch)


def step(recipe: Recipe, shape: tuple[int, int, int], batch: int, classes: int = 10) -> dict[str, int]:
    """The bytes of one training step of this recipe's network and regularisers, without weights and their gradients."""
    with torch.device("meta"):
        net, defences = build_defended(recipe, shape, classes)
        x = torch.empty(batch, *shape)
    net = net.to(memory_format=torch.channels_last)
    net.recompute = recipe.training.recompute == "layers"
    gradients = [torch.empty_like(p) for p in net.parameters()]
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        p.grad = gradient  # there before, and so not counted
    with Live() as live:
        loss = forward(net, defences, x)
        kept = live.now
        loss.backward()
    return {"kept": kept, "peak": live.peak}


def forward(net: SpikingNet, defences: list[Any], x: torch.Tensor) -> torch.Tensor:
    """A loss of the network on these images, with what the regularisers read of it."""
    readings: list[Any] = []
    logits = net(x, Reader(lambda trace: [d.read(trace) for d in defences], readings.append))
    loss = logits.square().mean()
    for read in zip(*readings, strict=True) if defences else ():
        loss = loss + torch.stack([value for value in read if value is not None]).mean()
    return loss


def fit(counted: dict[str, dict[str, int]], what: str) -> tuple[float, float, float]:
    """Offset and slope of bytes over T by least squares, and the largest deviation as a share of the value."""
    T = torch.tensor([[1.0, float(t)] for t in counted], dtype=torch.float64)
    y = torch.tensor([float(sizes[what]) for sizes in counted.values()], dtype=torch.float64)
    line = torch.linalg.lstsq(T, y).solution
    return line[0].item(), line[1].item(), ((T @ line - y) / y).abs().max().item()


def render(result: dict[str, Any]) -> str:
    """KiB per image and step as a Markdown table, and how far from linear the growth is."""
    rows = []
    for name, trainings in result["bytes"].items():
        for training, modes in trainings.items():
            for recompute, counted in modes.items():
                _, slope, off = fit(counted, "kept")
                cells = [name, training, recompute, f"{slope / result['batch'] / 2**10:.1f}", f"{off:.1%}"]
                rows.append(cells + [f"{c['kept'] / 2**30:.2f} ({c['peak'] / 2**30:.2f})" for c in counted.values()])
    header = ["network", "training", "recompute", "kept, KiB per image and step", "off the line"]
    header += [f"T = {T}, GiB kept (peak)" for T in STEPS]
    return harness.table(header, rows, f"float32, batch {result['batch']}. {harness.source(result)}")


main = harness.command("memory", run, render)

if __name__ == "__main__":
    main()
