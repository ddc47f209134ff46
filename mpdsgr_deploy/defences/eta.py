"""Adjust the weight eta of a regulariser during training, in place of a sweep.

After every epoch eta is multiplied by exp(step), a function of what the epochs so far have measured and of the eta
they used, so that a resumed run repeats it. The controller works in log eta: eta is known up to orders of magnitude
only, and what it does to Omega is closer to a power law than to a line. A step is at most ln 2 either way: 20 epochs
can cross six decades, and one noisy epoch cannot undo more than the next can repair.

Limits: it cannot raise Omega above its value without a regulariser, cannot change it once the learning rate has
decayed, and cannot hold it constant where it follows eta at once and as steeply as 1 / eta.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpdsgr_deploy.checkpoint import FILE, load_checkpoint
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe

LARGEST_STEP = math.log(2)
RANGE = (1e-3, 1e3)  # bounds of eta, for budgets that cannot be met
AHEAD = 4  # epochs; see step_to_omega
# What a reference must share with the run held against it: the images it validates on, and the network.
COMPARED: Any = {
    "data": {"name", "train_images", "validation_share", "image_size", "frames"},
    "model": True,
    "neuron": True,
    "encoding": True,
}
RECENT = 3  # epochs whose validation accuracy is averaged: one alone, of 1,000 images, is uncertain by a point


def step_to_omega(omegas: Sequence[float], target: float) -> float:
    """Return the step in log eta after epochs whose mean Omegas were `omegas`, in order.

    It is ln(forecast / target), where the forecast extrapolates ln Omega by AHEAD epochs at its present pace. In a
    short run eta sets how fast Omega falls, and the decaying learning rate does not bring it back if it fell too far,
    so a step from the last Omega alone would overshoot. In a long run Omega follows eta within an epoch, and
    extrapolation would oscillate; but then its changes alternate in sign, and the pace counts only what two changes
    have in common. With 4 epochs simulated plants of both kinds end within 3 % of the target in the median and within 8
    % in most cases; less overshoots the first kind, more oscillates on the second.
    """
    logs = [math.log(max(omega, 1e-6) / target) for omega in omegas[-3:]]
    changes = [after - before for before, after in pairwise(logs)]
    steady = len(changes) == 2 and changes[0] * changes[1] > 0
    return clipped(logs[-1] + AHEAD * (min(changes, key=abs) if steady else 0.0))


def step_within_drop(drops: Sequence[float], max_drop: float) -> float:
    """Return the step in log eta after epochs whose accuracy was `drops` below the reference, in order.

    Doubles eta where nothing was lost, keeps it where the budget is just spent, halves it at twice the budget.
    """
    recent = drops[-RECENT:]
    return clipped(LARGEST_STEP * (1 - sum(recent) / len(recent) / max_drop))


def clipped(step: float) -> float:
    """Return the step, limited to [-LARGEST_STEP, LARGEST_STEP]."""
    return min(max(step, -LARGEST_STEP), LARGEST_STEP)


def next_eta(eta: float, step: float) -> float:
    """Return eta after a step, limited to RANGE."""
    return min(max(eta * math.exp(step), RANGE[0]), RANGE[1])


def reference_accuracies(run: str, recipe: Recipe) -> list[float]:
    """Return the validation accuracy of a finished run by epoch, as the reference for a run of `recipe`.

    Raises InputError if there is no such run, if it has fewer epochs, or if it validated on other images.
    """
    last = Path(run) / "last"
    if not (last / FILE).is_file():
        raise InputError(f"defence.mpd-sgr.reference: {run} is not a training run; train it first, without defence")
    checkpoint = load_checkpoint(last)
    if "mpd-sgr" in checkpoint.recipe.defence:
        raise InputError(f"defence.mpd-sgr.reference: {run} was trained with mpd-sgr; train a reference without it")
    theirs, ours = (r.model_dump(include=COMPARED) for r in (checkpoint.recipe, recipe))
    changed = [f"{part}.{key}" for part in ours for key in ours[part] if theirs[part][key] != ours[part][key]]
    if changed:
        raise InputError(
            f"defence.mpd-sgr.reference: {run} has other values of {', '.join(changed)}; train a reference with the "
            "same values"
        )
    if len(checkpoint.history) < recipe.training.epochs:
        raise InputError(
            f"defence.mpd-sgr.reference: {run} has {len(checkpoint.history)} epochs and this run "
            f"{recipe.training.epochs}; train the reference for as many epochs, or lower training.epochs"
        )
    return accuracies(checkpoint.history)


def accuracies(history: Sequence[dict[str, Any]]) -> list[float]:
    """Return validation accuracy on clean images, epoch by epoch."""
    return [entry["validation_accuracy"] for entry in history]
