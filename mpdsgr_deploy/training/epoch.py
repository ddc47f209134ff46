"""Train for one epoch, and validate once.

The weights that are validated may be an exponential moving average over the run's steps, in place of the last weights:

    a <- d_s a + (1 - d_s) w,    d_s = min(decay, (1 + s) / (10 + s))

after step s, counted from 0 over the whole run, so that the untrained weights are forgotten within a few tens of steps.
The averaged network's activations differ from those of every network in the average, so its running statistics are
measured before it is used.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from mpdsgr_deploy.data.batches import augment, generator, shuffled_batches, take, to_unit
from mpdsgr_deploy.defences import AnyDefence, Step
from mpdsgr_deploy.diagnostics.distribution import observe_layers
from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import Observer, Reader, TdBN, Trace, frozen_statistics
from mpdsgr_deploy.training.profile import Profile, span

STATISTICS_BATCHES = 32  # batches on which the normalisation statistics of the averaged network are measured
Data = tuple[Tensor, Tensor]  # pixels uint8 [N, C, H, W] and classes [N]


class Learner(NamedTuple):
    """The objects that an epoch needs. `wrapped` is `model` as Fabric runs it (precision, several devices)."""

    fabric: Fabric
    recipe: Recipe
    wrapped: Any
    model: SpikingNet
    defences: list[AnyDefence]
    optimizer: Any
    profile: Profile | None = None
    average: SpikingNet | None = None  # average of `model` over the optimiser steps, if the recipe asks for it

    @property
    def judged(self) -> SpikingNet:
        """The network that is validated and saved: the averaged one, if there is an average, else `model`."""
        return self.model if self.average is None else self.average

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        """Augment pixels uint8 [B, C, H, W] and scale them to [0, 1], as training uses them before any attack."""
        config = self.recipe.data
        if config.augment != "none":
            pixels = augment(pixels, padding=config.crop_padding, flip=config.augment == "crop-flip", draw=draw)
        return to_unit(pixels)

    def attacked(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        """Return the images to train on in place of x; x itself if no defence attacks."""
        with self.fabric.autocast():
            for defence in self.defences:
                x = defence.examples(model, x, y, draw)
        return x


def train_epoch(learner: Learner, data: Data, epoch: int) -> dict[str, float]:
    """Train for one pass over the training images; return the epoch's means of all values of `batch_loss`.

    Raises InputError if the loss or a weight is no longer finite.
    """
    fabric, recipe = learner.fabric, learner.recipe
    config = recipe.training
    count = len(data[1])
    steps = count // config.batch_size
    shuffle = generator(config.seed, "shuffle", epoch)
    share = config.batch_size // (config.processes * config.accumulate)
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=fabric.device))
    learner.wrapped.train()
    batches = shuffled_batches(count, config.batch_size, shuffle)
    for step, index in enumerate(track(batches, f"epoch {epoch + 1}/{config.epochs}", steps)):
        for group in learner.optimizer.param_groups:
            group["lr"] = cosine(config.lr, epoch * steps + step, config.epochs * steps)
        parts = index.split(share)[fabric.global_rank :: config.processes]
        for number, part in enumerate(parts):
            draw = generator(config.seed, "draw", epoch, step, number, fabric.global_rank)
            with span("data"):
                x, y = take(data, part, fabric.device)
            with fabric.no_backward_sync(learner.wrapped, enabled=number + 1 < len(parts)):
                measured = batch_loss(learner, x, y, epoch, draw)
                with span("backward"):
                    fabric.backward(measured["loss"] / len(parts))
            for name, value in measured.items():
                totals[name] += value.detach() / (len(parts) * steps)
        with span("optimiser"):
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            for defence in learner.defences:
                defence.after_step(learner.model, generator(config.seed, "after step", epoch, step))
            if learner.average is not None:
                update_average(learner.average, learner.model, decay=config.average, step=epoch * steps + step)
        if learner.profile is not None:
            learner.profile.step()
    means = torch.as_tensor(fabric.all_reduce(torch.stack(list(totals.values())), reduce_op="mean")).tolist()
    learned = dict(zip(totals, means, strict=True))
    if not all(torch.isfinite(p).all() for p in learner.model.parameters()) or not math.isfinite(learned["loss"]):
        advice = "start again with a lower training.lr in another --out"
        raise InputError(f"the loss or the weights are not finite after epoch {epoch + 1}; {advice}")
    return learned


def batch_loss(learner: Learner, pixels: Tensor, y: Tensor, epoch: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Return a batch's `loss`, its parts (cross_entropy, each defence's term and weight), and train_accuracy.

    pixels uint8 [B, C, H, W], y [B]; all values are scalars.
    """
    with span("data"):
        clean = learner.images(pixels, draw)
    with span("attack"):
        x = learner.attacked(learner.model, clean, y, draw)

    seed = int(torch.randint(2**62, (), generator=draw))

    def run(model: Any, x: Tensor, observe: Observer | None) -> Tensor:
        return model(x, observe, torch.Generator().manual_seed(seed)).float()

    def forward(x: Tensor, observe: Observer | None) -> Tensor:
        # the bare network: Fabric's refuses input gradients under mixed precision. DDP waits at the parameters, so that
        # the gradients of these passes are exchanged as well
        with learner.fabric.autocast(), frozen_statistics(learner.model):
            return run(learner.model, x, observe)

    def read(trace: Trace) -> list[Any]:
        with span("regulariser"):
            return [defence.read(trace) for defence in learner.defences]

    readings: list[list[Any]] = []  # one layer's readings, one per defence
    logits = run(learner.wrapped, x, Reader(read, readings.append))
    with span("loss"):
        loss = cross_entropy = F.cross_entropy(logits, y, label_smoothing=learner.recipe.training.label_smoothing)
        measured = {"cross_entropy": cross_entropy, "train_accuracy": (logits.argmax(1) == y).float().mean()}
    for number, defence in enumerate(learner.defences):
        own = [layer[number] for layer in readings if layer[number] is not None]
        with span("regulariser"):
            term = defence.term(Step(forward, x, y, clean, logits, own, epoch, draw))
        if term is not None:
            measured[term.name] = term.value
            measured[f"{term.name}_weight"] = torch.full_like(term.value, term.weight)
            loss = loss + term.weight * term.value
    return {"loss": loss, **measured}


def settle_average(learner: Learner, data: Data, epoch: int) -> None:
    """Measure the running statistics of the averaged network on training images of the epoch."""
    average, config = learner.average, learner.recipe.training
    if average is None:
        return
    draw = generator(config.seed, "average", epoch)
    batches = islice(shuffled_batches(len(data[1]), config.batch_size, draw), STATISTICS_BATCHES)

    def images() -> Iterator[Tensor]:
        for index in batches:
            pixels, y = take(data, index, learner.fabric.device)
            yield learner.attacked(learner.model, learner.images(pixels, draw), y, draw)

    with learner.fabric.autocast():
        measure_statistics(average, images(), draw)


def cosine(lr: float, step: int, steps: int) -> float:
    """Return the cosine schedule from lr at step 0 to 0 at `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def validation_batches(learner: Learner, data: Data, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield this process's batches of the first `count` validation images: number, images in [0, 1], and classes."""
    config, device = learner.recipe, learner.fabric.device
    for number, index in enumerate(torch.arange(count).split(config.validation.batch_size)):
        if number % config.training.processes == learner.fabric.global_rank:
            pixels, y = take(data, index, device)
            yield number, to_unit(pixels), y


@torch.no_grad()
def validate_epoch(learner: Learner, data: Data, epoch: int) -> tuple[dict[str, float], list[LayerStatistics]]:
    """Return validation accuracy, the score that selects the best checkpoint, and the first batch's layer statistics.

    The score is the accuracy on the kind of images that the run trains on: clean, or under the training attack.
    """
    fabric, recipe = learner.fabric, learner.recipe
    learner.wrapped.eval()
    model = learner.judged
    layers: list[LayerStatistics] = []
    correct = torch.zeros(2, device=fabric.device)
    for number, clean, y in validation_batches(learner, data, len(data[1])):
        draw = generator(recipe.training.seed, "validation", epoch, number)
        observe = observe_layers(layers) if number == 0 else None
        attacked = learner.attacked(model, clean, y, draw)
        # the bare network: DDP's would wait in every forward pass for ranks that have fewer batches
        with fabric.autocast():
            right = (model(clean, observe, draw).argmax(1) == y).sum()
            correct[0] += right
            correct[1] += right if attacked is clean else (model(attacked, None, draw).argmax(1) == y).sum()
    accuracies = torch.as_tensor(fabric.all_reduce(correct, reduce_op="sum")) / len(data[1])
    return dict(zip(("validation_accuracy", "score"), accuracies.tolist(), strict=True)), layers


@torch.no_grad()
def update_average(average: SpikingNet, model: SpikingNet, *, decay: float, step: int) -> None:
    """Add the weights after `step` of the run to the average. Its running statistics do not change."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


@torch.no_grad()
def measure_statistics(model: SpikingNet, batches: Iterable[Tensor], noise: torch.Generator) -> None:
    """Set the running statistics of tdBN and batch normalisation to their means over batches of images [B, C, H, W]."""
    norms = [part for part in model.modules() if isinstance(part, TdBN | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for number, x in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number  # weight of the n-th batch in a mean over n batches
        model(x, None, noise)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
