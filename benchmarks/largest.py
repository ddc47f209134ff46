"""One training step of VGG11 with T = 32 on 128 images, for real: what the operating system says it took.

    python benchmarks/largest.py      writes benchmarks/results/largest.json and the line of benchmarks/README.md

It takes minutes on a few cores and is no measure of speed. Needing more than `--limit` ends it.
"""

import resource
from typing import Any

import click
import harness
import torch
from memory import forward, step
from networks import CLASSES, SHAPE

from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.recipe import Recipe


@click.option("--limit", default=24.0, show_default=True, help="GiB that the process may have.")
@click.option("--steps", "T", default=32, show_default=True, help="Time steps T.")
@click.option("--batch", default=128, show_default=True, help="Images.")
@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
def run(limit: float, T: int, batch: int, width: float) -> dict[str, Any]:
    """Take one training step."""
    size = int(limit * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))  # a step that needs more fails instead of being swapped
    return {"limit_gib": limit, **measure(T, batch, width)}


def measure(T: int, batch: int, width: float) -> dict[str, Any]:
    """Bytes of activations as counted, and the process's peak over a real step: forward, backward, optimiser."""
    values = {"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}, "training": {"recompute": "layers"}}
    recipe = Recipe.model_validate({**values, "defence": {"mpd-sgr": {"estimator": "empirical"}}})
    counted = step(recipe, SHAPE, batch, CLASSES)["peak"]
    torch.manual_seed(0)
    net, defences = build_defended(recipe, SHAPE, CLASSES)
    net = net.to(memory_format=torch.channels_last)
    net.recompute = True
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses: list[torch.Tensor] = []

    def one_step() -> None:
        losses.append(forward(net, defences, torch.rand(batch, *SHAPE)))
        losses[0].backward()
        optimizer.step()

    return {
        "setting": {"T": T, "batch": batch, "width": width, "threads": torch.get_num_threads()},
        "seconds": harness.timed(one_step),
        "loss": losses[0].item(),
        "counted_bytes": counted,
        "kept_for_good_bytes": 12 * sum(p.numel() for p in net.parameters()),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def render(result: dict[str, Any]) -> str:
    """One paragraph."""
    setting = result["setting"]
    peak, counted, always = (result[f"{name}_bytes"] / 2**30 for name in ("peak", "counted", "kept_for_good"))
    return (
        f"One step of VGG11 at width {setting['width']:g} with T = {setting['T']}, {setting['batch']} images, "
        f"empirical regulariser, float32, layers computed again: {peak:.2f} GiB at the peak, all of the process, of "
        f"{result['limit_gib']:g} allowed; counted were {counted:.2f} GiB of activations and {always:.2f} of weights, "
        f"gradients and momentum.\n{harness.source(result)}\n"
    )


main = harness.command("largest", run, render)

if __name__ == "__main__":
    main()
