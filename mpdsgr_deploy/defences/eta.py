"""Adjust the weight eta of a regulariser during training, instead of a sweep over eta.

After every epoch eta is multiplied by exp(step). The step depends only on measurements and etas of earlier epochs, so a
resumed run repeats it. The controller works in log eta, because a good eta is known only up to orders of magnitude, and
because its effect on Omega resembles a power law more than a line. A step is at most ln 2 in either direction: 20
epochs can cross six decades, and the effect of one noisy epoch can be undone by the next.

Limits: the controller cannot raise Omega above its value without a regulariser, cannot change it once the learning rate
has decayed, and cannot keep it constant if it follows eta without delay and as steeply as 1 / eta.
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
# Settings that must be equal in a reference and the run compared with it: the validation images and the network.
COMPARED: Any = {
    "data": {"name", "train_images", "validation_share", "image_size", "frames"},
    "model": True,
    "neuron": True,
    "encoding": True,
}
# epochs whose validation accuracy is averaged; that of one, on 1,000 images, is uncertain by a percentage point
RECENT = 3


def step_to_omega(omegas: Sequence[float], target: float) -> float:
    """Return the step in log eta after epochs whose mean Omegas were `omegas`, in order.

    It is ln(forecast / target), where the forecast extrapolates ln Omega by AHEAD epochs at its present rate. In a
    short run, eta determines how fast Omega falls, and with a decaying learning rate Omega does not recover if it fell
    too far; a step computed from the last Omega alone would overshoot. In a long run, Omega follows eta within an
    epoch, and extrapolation alone would oscillate. But then changes of Omega alternate in sign, and the rate is the
    smaller of the last two changes, or 0 if their signs differ. With AHEAD = 4, simulations of both kinds of runs end
    within 3 % of the target in the median and within 8 % in most cases; a smaller value overshoots in the first kind, a
    larger one oscillates in the second.
    """
    logs = [math.log(max(omega, 1e-6) / target) for omega in omegas[-3:]]
    changes = [after - before for before, after in pairwise(logs)]
    steady = len(changes) == 2 and changes[0] * changes[1] > 0
    return clipped(logs[-1] + AHEAD * (min(changes, key=abs) if steady else 0.0))


def step_within_drop(drops: Sequence[float], max_drop: float) -> float:
    """Return the step in log eta after epochs whose accuracy was `drops` below the reference, in order.

    The mean drop of recent epochs decides: 0 doubles eta, `max_drop` keeps it, and twice `max_drop` halves it.
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
