"""One epoch of learning and one of validation."""

import math
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from mpdsgr_deploy.data.batches import augment, generator, shuffled_batches, take, to_unit
from mpdsgr_deploy.defences import adversarial_examples
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.mpd import ESTIMATORS, LayerStatistics, Overlap, observe_layers
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.recipe import Recipe

Data = tuple[Tensor, Tensor]  # pixels uint8 [N, C, H, W] and classes [N]


class Learner(NamedTuple):
    """What an epoch needs. `wrapped` is `model` as Fabric runs it (precision, several devices)."""

    fabric: Fabric
    recipe: Recipe
    wrapped: Any
    model: SpikingNet
    optimizer: Any


def train_epoch(learner: Learner, data: Data, epoch: int) -> dict[str, float]:
    """One pass over the training images; returns the means of loss, cross_entropy, omega and train_accuracy."""
    fabric, recipe = learner.fabric, learner.recipe
    config = recipe.training
    count = len(data[1])
    steps = count // config.batch_size
    shuffle = generator(config.seed, "shuffle", epoch)
    share = config.batch_size // (config.devices * config.accumulate)
    totals = torch.zeros(4, device=fabric.device)
    learner.wrapped.train()
    batches = shuffled_batches(count, config.batch_size, shuffle)
    for step, index in enumerate(track(batches, f"epoch {epoch + 1}/{config.epochs}", steps)):
        for group in learner.optimizer.param_groups:
            group["lr"] = cosine(config.lr, epoch * steps + step, config.epochs * steps)
        parts = index.split(share)[fabric.global_rank :: config.devices]
        for number, part in enumerate(parts):
            draw = generator(config.seed, "draw", epoch, step, number, fabric.global_rank)
            x, y = take(data, part, fabric.device)
            with fabric.no_backward_sync(learner.wrapped, enabled=number + 1 < len(parts)):
                loss, measured = batch_loss(learner, x, y, draw)
                fabric.backward(loss / len(parts))
            totals += measured / len(parts)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    totals = torch.as_tensor(fabric.all_reduce(totals / steps, reduce_op="mean"))
    loss, cross_entropy, omega, accuracy = totals.tolist()
    if not all(torch.isfinite(p).all() for p in learner.model.parameters()) or not math.isfinite(loss):
        advice = "start again with a lower training.lr in another --out"
        raise InputError(f"loss or weights are not finite after epoch {epoch + 1}; {advice}")
    return {"loss": loss, "cross_entropy": cross_entropy, "omega": omega, "train_accuracy": accuracy}


def batch_loss(learner: Learner, pixels: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """CE + eta * Omega on one (adversarial) batch, and [loss, cross entropy, omega, accuracy] detached.

    Where the recipe has no regulariser, Omega is not computed and reads 0.
    """
    data, regularizer, defence = learner.recipe.data, learner.recipe.regularizer, learner.recipe.defence
    if data.augment != "none":
        pixels = augment(pixels, padding=data.crop_padding, flip=data.augment == "crop-flip", draw=draw)
    x = to_unit(pixels)
    if defence.name == "at":
        with learner.fabric.autocast():
            x = adversarial_examples(learner.model, x, y, defence, draw)
    regularized = regularizer.name == "mpd-sgr"
    observer = Overlap(choose("estimator", ESTIMATORS, regularizer.estimator)) if regularized else None
    logits = learner.wrapped(x, observer).float()
    cross_entropy = F.cross_entropy(logits, y)
    omega = observer.loss() if observer else torch.zeros((), device=logits.device)
    loss = cross_entropy + regularizer.eta * omega
    accuracy = (logits.argmax(1) == y).float().mean()
    return loss, torch.stack([loss, cross_entropy, omega, accuracy]).detach()


def cosine(lr: float, step: int, steps: int) -> float:
    """Cosine schedule from lr at step 0 to 0 at `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def validate_epoch(learner: Learner, data: Data, epoch: int) -> tuple[dict[str, float], list[LayerStatistics]]:
    """Validation accuracy, the score that selects the best checkpoint, and layer statistics of the first batch.

    The score is the accuracy on what the run trains for: clean images, or under the training attack.
    """
    fabric, recipe = learner.fabric, learner.recipe
    learner.wrapped.eval()
    layers: list[LayerStatistics] = []
    correct = torch.zeros(2, device=fabric.device)
    batches = torch.arange(len(data[1])).split(recipe.validation.batch_size)
    for number, index in enumerate(batches):
        if number % recipe.training.devices != fabric.global_rank:
            continue
        pixels, y = take(data, index, fabric.device)
        x = to_unit(pixels)
        observer = observe_layers(layers) if number == 0 else None
        # the bare network: DDP's would wait in every forward pass for ranks that have fewer batches
        with fabric.autocast():
            correct[0] += (learner.model(x, observer).argmax(1) == y).sum()
            if recipe.defence.name == "at":
                draw = generator(recipe.training.seed, "validation", epoch, number)
                x = adversarial_examples(learner.model, x, y, recipe.defence, draw)
                correct[1] += (learner.model(x).argmax(1) == y).sum()
    clean, attacked = (torch.as_tensor(fabric.all_reduce(correct, reduce_op="sum")) / len(data[1])).tolist()
    return {"validation_accuracy": clean, "score": attacked if recipe.defence.name == "at" else clean}, layers
