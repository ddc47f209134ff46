"""One training step of VGG11 with T = 32 on 128 images, for real: what the operating system says it took.

    python benchmarks/largest.py      writes benchmarks/results/largest.json and the line of benchmarks/README.md

It takes minutes on a few cores and is no measure of speed. Needing more than `--limit` ends it.
"""

import resource
import time
from typing import Any

import click
import figures
import torch
from memory import forward, step

from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe

SHAPE, CLASSES = (3, 32, 32), 10


@click.command()
@click.option("--limit", default=24.0, show_default=True, help="GiB that the process may have.")
@click.option("--steps", "T", default=32, show_default=True, help="Time steps T.")
@click.option("--batch", default=128, show_default=True, help="Images.")
@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
def main(limit: float, T: int, batch: int, width: float) -> None:
    """Measure and publish."""
    size = int(limit * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))  # a step that needs more fails instead of being swapped
    result = {"limit_gib": limit, **measure(T, batch, width), "provenance": provenance()}
    figures.publish("largest", result, render(result))
    click.echo(render(result))


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
    started = time.perf_counter()
    loss = forward(net, defences, torch.rand(batch, *SHAPE))
    loss.backward()
    optimizer.step()
    return {
        "setting": {"T": T, "batch": batch, "width": width, "threads": torch.get_num_threads()},
        "seconds": time.perf_counter() - started,
        "loss": loss.item(),
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
        f"gradients and momentum.\n{figures.source(result)}\n"
    )


if __name__ == "__main__":
    main()
