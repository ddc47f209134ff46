"""Train for one epoch, and validate the result on clean and on attacked images.

If the recipe asks for it, the network that is validated has an exponential moving average a of the weights w:

    a <- d_s a + (1 - d_s) w,    d_s = min(decay, (1 + s) / (10 + s))

after step s, counted from 0 over the whole run. With this d_s the untrained weights lose their influence within a few
tens of steps. The activations of the averaged network differ from those of all networks in the average, so its running
statistics are measured before it is validated.
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

from mpdsgr_deploy.checkpoint import VALIDATION_PGD
from mpdsgr_deploy.data.batches import augment, generator, shuffled_batches, take, to_unit
from mpdsgr_deploy.defences import AnyDefence, Step
from mpdsgr_deploy.defences.adversarial import AdversarialSettings, AdversarialTraining, deployed
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
    """The objects that an epoch needs. `wrapped` is `model` with Fabric's handling of precision and devices."""

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
        """The network that is validated and saved: the averaged network if there is one, else `model`."""
        return self.model if self.average is None else self.average

    def images(self, pixels: Tensor, draw: torch.Generator) -> Tensor:
        """Return pixels uint8 [B, C, H, W], augmented as the recipe says, as float32 in [0, 1]."""
        config = self.recipe.data
        if config.augment != "none":
            pixels = augment(pixels, padding=config.crop_padding, flip=config.augment == "crop-flip", draw=draw)
        return to_unit(pixels)

    def attacked(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        """Return the images to train on in place of x [B, C, H, W] of classes y [B]; x itself if no defence attacks."""
        with self.fabric.autocast():
            for defence in self.defences:
                x = defence.examples(model, x, y, draw)
        return x


def train_epoch(learner: Learner, data: Data, epoch: int) -> dict[str, float]:
    """Train for one pass over the training images; return the means over the epoch of the values of `batch_loss`.

    epoch: counted from 0. Raises InputError if the loss or a weight is no longer finite.
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
    """Return the loss of a batch and its parts, as scalars by name.

    pixels: uint8 [B, C, H, W]; y: classes [B]; draw: the generator of all random numbers. The names are loss,
    cross_entropy, train_accuracy in [0, 1], and NAME and NAME_weight for each term of a defence.
    """
    with span("data"):
        clean = learner.images(pixels, draw)
    with span("attack"):
        x = learner.attacked(learner.model, clean, y, draw)

    seed = int(torch.randint(2**62, (), generator=draw))

    def run(model: Any, x: Tensor, observe: Observer | None) -> Tensor:
        return model(x, observe, torch.Generator().manual_seed(seed)).float()

    def forward(x: Tensor, observe: Observer | None) -> Tensor:
        # not the wrapped network, which refuses gradients of its input under mixed precision. DDP exchanges gradients
        # when they reach the parameters, so those of these passes are included
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
        of_defence = [layer[number] for layer in readings if layer[number] is not None]
        with span("regulariser"):
            term = defence.term(Step(forward, x, y, clean, logits, of_defence, epoch, draw))
        if term is not None:
            measured[term.name] = term.value
            measured[f"{term.name}_weight"] = torch.full_like(term.value, term.weight)
            loss = loss + term.weight * term.value
    return {"loss": loss, **measured}


def settle_average(learner: Learner, data: Data, epoch: int) -> None:
    """Measure the running statistics of the averaged network on training images, if there is such a network."""
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
    """Return the learning rate at `step`: a half cosine from lr at step 0 to 0 at `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def validation_batches(learner: Learner, data: Data, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield this process's share of the batches of the first `count` validation images.

    A batch is its number, images float32 [B, C, H, W] in [0, 1], and classes [B].
    """
    config, device = learner.recipe, learner.fabric.device
    for number, index in enumerate(torch.arange(count).split(config.validation.batch_size)):
        if number % config.training.processes == learner.fabric.global_rank:
            pixels, y = take(data, index, device)
            yield number, to_unit(pixels), y


@torch.no_grad()
def validate_epoch(learner: Learner, data: Data, epoch: int) -> tuple[dict[str, float], list[LayerStatistics]]:
    """Return validation_accuracy and score, both in [0, 1], and the layer statistics of the first batch.

    validation_accuracy: on clean images. score, which selects the best checkpoint: the accuracy on images like those
    that the run trains on, under the training attack if a defence attacks, else clean.
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
        # not the wrapped network, because DDP would wait in every forward pass for processes with fewer batches
        with fabric.autocast():
            correct_clean = (model(clean, observe, draw).argmax(1) == y).sum()
            correct[0] += correct_clean
            correct[1] += correct_clean if attacked is clean else (model(attacked, None, draw).argmax(1) == y).sum()
    accuracies = torch.as_tensor(fabric.all_reduce(correct, reduce_op="sum")) / len(data[1])
    return dict(zip(("validation_accuracy", "score"), accuracies.tolist(), strict=True)), layers


@torch.no_grad()
def update_average(average: SpikingNet, model: SpikingNet, *, decay: float, step: int) -> None:
    """Add the weights after `step` of the run to the average, in place. Running statistics do not change."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


@torch.no_grad()
def measure_statistics(model: SpikingNet, batches: Iterable[Tensor], noise: torch.Generator) -> None:
    """Set the running statistics of all normalisation to their means over batches of images [B, C, H, W].

    The model is in eval mode afterwards.
    """
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


def attack_epoch(learner: Learner, data: Data, epoch: int) -> dict[str, float]:
    """Return {VALIDATION_PGD: accuracy in [0, 1]} on the first `training.attacked_images` validation images under PGD.

    Without such images the result is {}. The attack is the PGD of the recipe's [attack], through the surrogate of
    training and with a random start, on the network that is saved. The gradient of a stochastic network is that of one
    draw of its noise, not the mean over `attack.draws`, so this accuracy is higher than under `mpdsgr validate`, and
    only the latter measures robustness.
    """
    fabric, recipe = learner.fabric, learner.recipe
    count, attack = min(recipe.training.attacked_images, len(data[1])), recipe.attack
    if not count:
        return {}
    attacker = AdversarialTraining(AdversarialSettings(eps=attack.eps, steps=attack.steps, step=attack.step))
    correct = torch.zeros((), device=fabric.device)
    for number, clean, y in validation_batches(learner, data, count):
        draw = generator(recipe.training.seed, "attacked validation", epoch, number)
        with fabric.autocast():
            attacked = attacker.examples(learner.judged, clean, y, draw)
            with deployed(learner.judged, draw) as network, torch.no_grad():
                correct += (network(attacked).argmax(1) == y).sum()
    return {VALIDATION_PGD: float(torch.as_tensor(fabric.all_reduce(correct, reduce_op="sum"))) / count}
