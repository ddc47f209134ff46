"""What a training step needs on several GPUs, and on images of ImageNet's size: counted, not timed.

    python benchmarks/estimate.py      writes benchmarks/results/estimate.json and the table of benchmarks/README.md

Networks are built and differentiated on tensors without data: operations are those of convolutions and matrix products
(torch.utils.flop_counter), bytes those of tensors alive (see `live`). What is exchanged follows from the parameters.
"""

from typing import Any

import harness
import torch
from memory import step
from torch.utils.flop_counter import FlopCounterMode

from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import TdBN

T, BATCH, GPUS = 8, 32, 8
NETWORKS = {
    "VGG11, 32x32, 10 classes": ("vgg11", 32, 10),
    "WRN16-4, 32x32, 10 classes": ("wrn16-4", 32, 10),
    "VGG16, 64x64, 200 classes": ("vgg16", 64, 200),
    "VGG16, 224x224, 1000 classes": ("vgg16", 224, 1000),
    "WRN16-4, 224x224, 1000 classes": ("wrn16-4", 224, 1000),
}


def run() -> dict[str, Any]:
    """Count operations and bytes of training steps."""
    counted = {name: measure(*network) for name, network in NETWORKS.items()}
    return {"T": T, "batch": BATCH, "gpus": GPUS, "networks": counted}


def measure(model: str, side: int, classes: int, *, steps: int = T, batch: int = BATCH) -> dict[str, Any]:
    """Parameters, tdBN channels, forward and backward operations an image, and bytes of a GPU's batch."""
    values = {"model": {"name": model}, "encoding": {"T": steps}, "defence": {"mpd-sgr": {"estimator": "theorem"}}}
    recipe, shape = Recipe.model_validate(values), (3, side, side)
    with torch.device("meta"):
        net = build_model(recipe, shape, classes)
        x = torch.empty(2, *shape)
    with FlopCounterMode(display=False) as forward:
        loss = net(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    modes = {}
    for mode in ("none", "layers"):
        training = recipe.training.model_copy(update={"recompute": mode})
        modes[mode] = step(recipe.model_copy(update={"training": training}), shape, batch, classes)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "channels": sum(m.weight.numel() for m in net.modules() if isinstance(m, TdBN)),
        "forward_flop": forward.get_total_flops() / len(x),
        "backward_flop": backward.get_total_flops() / len(x),
        "bytes": modes,
    }


def exchanged(parameters: int, gpus: int) -> float:
    """Bytes that each GPU sends for the sum of all gradients in float32 around a ring: 2 (G - 1) / G * 4 P."""
    return 2 * (gpus - 1) / gpus * 4 * parameters


def normalised(channels: int, gpus: int) -> float:
    """Bytes that each sends for joint statistics: 8 a channel to all others forward, 8 around a ring backward."""
    return (gpus - 1) * 8 * channels + 2 * (gpus - 1) / gpus * 8 * channels


HEADER = [
    *("network", "parameters, M", "GFLOP an image, forward + backward", "+ recompute", "activations at the peak, GiB"),
    *("with recompute", "weights, gradients, momentum, GiB", "gradients sent a GPU and step, MB", "sync_norm, kB"),
    "backward FLOP a byte sent",
]


def render(result: dict[str, Any]) -> str:
    """One row a network."""
    batch, gpus, rows = result["batch"], result["gpus"], []
    for name, counted in result["networks"].items():
        parameters, forward, backward = counted["parameters"], counted["forward_flop"], counted["backward_flop"]
        sent = exchanged(parameters, gpus)
        rows.append(
            [
                name,
                f"{parameters / 1e6:.1f}",
                f"{forward / 1e9:.1f} + {backward / 1e9:.1f}",
                f"{forward / 1e9:.1f}",
                *(f"{counted['bytes'][mode]['peak'] / 2**30:.2f}" for mode in ("none", "layers")),
                f"{12 * parameters / 2**30:.2f}",
                f"{sent / 1e6:.0f}",
                f"{normalised(counted['channels'], gpus) / 1e3:.0f}",
                f"{batch * backward / sent:.0f}",
            ]
        )
    setting = f"T = {result['T']}, float32, {batch} images a GPU, {gpus} GPUs. {harness.source(result)}"
    return harness.table(HEADER, rows, setting)


main = harness.command("estimate", run, render)

if __name__ == "__main__":
    main()
