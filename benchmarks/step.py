"""What the regulariser costs in time: one whole training step with it, paired with the same step of REG.

    python benchmarks/step.py      writes benchmarks/results/step.json and the table of benchmarks/README.md

A step is what the training loop does with a batch: forward, loss, backward, optimiser. The images are random: the time
does not depend on what they show.
"""

import statistics
from functools import partial
from typing import Any

import click
import harness
import torch
from lightning_fabric import Fabric
from networks import CLASSES, SHAPE

from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training.epoch import Learner, batch_loss

PRECISIONS = ("32-true", "bf16-mixed")
VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    "REG": {},
    "theorem": {"mpd-sgr": {"estimator": "theorem"}},
    "empirical, overlap": {"mpd-sgr": {"estimator": "empirical"}},
    "empirical, expected gradient": {"mpd-sgr": {"estimator": "empirical", "measure": "expected-gradient"}},
}


@click.option("--width", default=0.25, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=4, show_default=True, help="Time steps T.")
@click.option("--batch", default=32, show_default=True, help="Images a step.")
@click.option("--repetitions", default=40, show_default=True, help="Steps timed of each variant.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def run(width: float, T: int, batch: int, repetitions: int, accelerator: str) -> dict[str, Any]:
    """Time training steps."""
    setting = {"width": width, "T": T, "batch": batch, "accelerator": accelerator, "threads": torch.get_num_threads()}
    return {"setting": setting, "seconds": {name: measure(setting, name, repetitions) for name in PRECISIONS}}


def measure(setting: dict[str, Any], precision: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, [repetitions] in the order they were taken."""
    learners = {name: learner(setting, precision, defence) for name, defence in VARIANTS.items()}
    draw = generator(0, "benchmark")
    pixels = torch.randint(256, (setting["batch"], *SHAPE), dtype=torch.uint8, generator=draw)
    y = torch.randint(CLASSES, (setting["batch"],), generator=draw)
    contenders = {name: partial(timed_step, learner, pixels, y) for name, learner in learners.items()}
    return harness.take_turns(contenders, repetitions, warm_up=2)


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

    def step() -> None:
        learner.fabric.backward(batch_loss(learner, pixels, y, 0, generator(0, "draw"))["loss"])
        learner.optimizer.step()
        learner.optimizer.zero_grad()

    return harness.timed(step)


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    setting, rows = result["setting"], []
    for name in VARIANTS:
        cells = [name if name == "REG" else f"MPD-SGR {name}"]
        for seconds in result["seconds"].values():
            ratio = "1" if name == "REG" else harness.spread(seconds[name], seconds["REG"], "{:.3f}")
            cells += [f"{1000 * statistics.median(seconds[name]):.0f}", ratio]
        rows.append(cells)
    n = len(next(iter(result["seconds"].values()))["REG"])
    return harness.table(
        ["training", *(column for p in result["seconds"] for column in (f"{p}, ms", f"{p}, times REG"))],
        rows,
        f"VGG11 at width {setting['width']}, 32x32 images, T = {setting['T']}, batch {setting['batch']}, "
        f"{setting['threads']} threads; {harness.paired(n, 'steps')}.",
        harness.source(result),
    )


main = harness.command("step", run, render)

if __name__ == "__main__":
    main()
