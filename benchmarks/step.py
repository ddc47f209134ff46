"""What the regulariser costs in time: one whole training step with it, paired with the same step of REG.

    python benchmarks/step.py      writes benchmarks/results/step.json and the table of benchmarks/README.md

A step is what the training loop does with a batch: forward, loss, backward, optimiser. The variants live in one process
and take turns, in an order that rotates, so that a busy machine disturbs them alike. Each repetition gives one ratio to
REG a variant; the table shows median and quartiles. The images are random: the time does not depend on what they show.
"""

import statistics
import time
from typing import Any

import click
import figures
import torch
from lightning.fabric import Fabric

from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training.epoch import Learner, batch_loss

SHAPE, CLASSES = (3, 32, 32), 10
PRECISIONS = ("32-true", "bf16-mixed")
VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    "REG": {},
    "theorem": {"mpd-sgr": {"estimator": "theorem"}},
    "empirical, overlap": {"mpd-sgr": {"estimator": "empirical"}},
    "empirical, expected gradient": {"mpd-sgr": {"estimator": "empirical", "measure": "expected-gradient"}},
}


@click.command()
@click.option("--width", default=0.25, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=4, show_default=True, help="Time steps T.")
@click.option("--batch", default=32, show_default=True, help="Images a step.")
@click.option("--repetitions", default=40, show_default=True, help="Steps timed of each variant.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(width: float, T: int, batch: int, repetitions: int, accelerator: str) -> None:
    """Measure and publish."""
    setting = {"width": width, "T": T, "batch": batch, "accelerator": accelerator, "threads": torch.get_num_threads()}
    seconds = {precision: measure(setting, precision, repetitions) for precision in PRECISIONS}
    result = {"setting": setting, "seconds": seconds, "provenance": provenance()}
    figures.publish("step", result, render(result))
    click.echo(render(result))


def measure(setting: dict[str, Any], precision: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, [repetitions] in the order they were taken."""
    learners = {name: learner(setting, precision, defence) for name, defence in VARIANTS.items()}
    draw = generator(0, "benchmark")
    pixels = torch.randint(256, (setting["batch"], *SHAPE), dtype=torch.uint8, generator=draw)
    y = torch.randint(CLASSES, (setting["batch"],), generator=draw)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for repetition in range(-2, repetitions):  # two to warm up
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            taken = timed_step(learners[name], pixels, y)
            if repetition >= 0:
                seconds[name].append(round(taken, 6))
    return seconds


def learner(
    setting: dict[str, Any], precision: str, defence: dict[str, dict[str, str]], name: str = "vgg11"
) -> Learner:
    """An untrained network and its optimiser, as the training loop sets them up."""
    model = {"name": name, "width": setting["width"]}
    recipe = Recipe.model_validate({"model": model, "encoding": {"T": setting["T"]}, "defence": defence})
    fabric = Fabric(accelerator=setting["accelerator"], devices=1, precision=precision)
    torch.manual_seed(0)
    net, defences = build_defended(recipe, SHAPE, CLASSES)
    net = net.to(memory_format=torch.channels_last)
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    return Learner(fabric, recipe, wrapped, net, defences, optimizer)


def timed_step(learner: Learner, pixels: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of one training step on this batch."""
    device = learner.fabric.device
    pixels, y = pixels.to(device), y.to(device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    started = time.perf_counter()
    learner.fabric.backward(batch_loss(learner, pixels, y, 0, generator(0, "draw"))["loss"])
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    synchronise()
    return time.perf_counter() - started


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting = result["setting"]
    lines = [
        "| training | " + " | ".join(f"{p}, ms | {p}, times REG" for p in result["seconds"]) + " |",
        "|---" * (1 + 2 * len(result["seconds"])) + "|",
    ]
    for name in VARIANTS:
        cells = [name if name == "REG" else f"MPD-SGR {name}"]
        for seconds in result["seconds"].values():
            cells.append(f"{1000 * statistics.median(seconds[name]):.0f}")
            ratios = [ours / reg for ours, reg in zip(seconds[name], seconds["REG"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append("1" if name == "REG" else f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    n = len(next(iter(result["seconds"].values()))["REG"])
    return "\n".join(
        [
            *lines,
            "",
            f"VGG11 at width {setting['width']}, 32x32 images, T = {setting['T']}, batch {setting['batch']}, "
            f"{setting['threads']} threads; median [quartiles] of n = {n} paired steps.",
            figures.source(result),
            "",
        ]
    )


if __name__ == "__main__":
    main()
