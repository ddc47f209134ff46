"""Sparse attacks on event frames: which events to add, remove or move so that a network errs, within a budget.

Frames hold whole numbers of events: counts 0..levels of T frames, channel 2 t + polarity, stored as count / levels.
Attacked frames do too, so every attacked image is a valid recording.

Each round proposes the edits with the largest gain according to the gradient. It either makes them, or first tests each
edit alone on the network and makes those that lower the margin (true logit minus the largest wrong one). Once the
network errs, a binary search undoes as many of the least effective edits as it can while the network still errs. The
tests are the generation step and the undoing is the reduction step of SDA (Lun et al., CVPR 2025, arXiv 2503.03272),
extended from flips to counts and moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.targets import best_wrong
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.protocols import Differentiable, Predictor

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
TRIALS = 256  # images classified at once


class Edit(NamedTuple):
    """Remove one event at index `out` of the flattened counts and add one at `into`; None: remove, or add, none."""

    out: int | None
    into: int | None


# Arguments: the counts now, the clean counts and the gradient of the loss, all [C, H, W], and the most edits to return.
# Result: possible edits, the most promising first.
Propose = Callable[[Counts, Counts, Floats, int], list[Edit]]


class EventSearch(NamedTuple):
    """The settings of a search.

    share: the largest share of the budget that one round spends; None: a round makes all edits that help, and the
    reduction undoes those that are not needed (SDA). candidates: round r tests r * candidates edits of every recording
    that is still classified correctly, each edit alone; 0: no tests, edits are chosen by the gradient. Many edits have
    no effect alone, because no potential crosses the threshold, but a large effect together.
    """

    rounds: int
    share: float | None
    candidates: int = 0


@dataclass
class _Recording:
    """One recording under attack: its counts now, the edits made so far, and the gain of each edit.

    The gain is the decrease of the margin, or the decrease per edit of a round whose edits were not tested.
    """

    clean: Counts
    y: int
    counts: Counts
    edits: list[Edit] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    fooled: bool = False

    def allows(self, edit: Edit, levels: int) -> bool:
        """Whether an edit is possible in addition to those made."""
        counts, clean = self.counts.ravel(), self.clean.ravel()
        out, into = edit
        leaves = out is None or bool(can_lose(counts[out], clean[out]))
        return leaves and (into is None or bool(can_gain(counts[into], clean[into], levels)))

    def without(self, dropped: int) -> Counts:
        """Return the counts without the `dropped` edits of the smallest gains."""
        order = np.argsort(self.gains, kind="stable")[dropped:]
        return applied(self.clean, [self.edits[i] for i in sorted(order)])


def search_events(
    network: Predictor,
    gradients: Differentiable,
    x: Floats,
    y: NDArray[np.int64],
    propose: Propose,
    *,
    budget: int,
    levels: int,
    search: EventSearch,
) -> Floats:
    """Return event frames x [B, C, H, W] of classes y [B] with at most `budget` edits each.

    network: computes logits; gradients: the same network, differentiated with the loss "weighted" (see
    `attacks.condition.Network`). A recording that is still classified correctly is returned with the `budget` edits of
    the largest gains. Raises InputError for images that are not counts / levels.
    """
    recordings = [_Recording(counts, int(label), counts) for counts, label in zip(counts_of(x, levels), y, strict=True)]
    for number in range(1, search.rounds + 1):
        active = [r for r in recordings if not r.fooled and (search.share is None or len(r.edits) < budget)]
        if not active:
            break
        _round(network, gradients, active, propose, budget, levels, search, number)
    _reduce(network, [r for r in recordings if r.fooled], levels)
    return _frames([r.without(max(0, len(r.edits) - budget)) for r in recordings], levels)


def _round(
    network: Predictor,
    gradients: Differentiable,
    active: Sequence[_Recording],
    propose: Propose,
    budget: int,
    levels: int,
    search: EventSearch,
    number: int,
) -> None:
    """Make the edits of round `number`, counted from 1, in place."""
    images, labels = _frames([r.counts for r in active], levels), np.array([r.y for r in active])
    before, weights = best_wrong(network(images), labels)
    slopes = np.asarray(gradients(images, weights).gradient)
    most = None if search.share is None else max(1, round(search.share * budget))
    most_edits = number * search.candidates if search.candidates else 2 * (budget if most is None else most)
    proposals = [propose(r.counts, r.clean, slope, most_edits) for r, slope in zip(active, slopes, strict=True)]
    ranks = [[float(len(edits) - place) for place in range(len(edits))] for edits in proposals]
    gains = _gains(network, active, proposals, before, levels) if search.candidates else ranks
    made_before = [len(r.edits) for r in active]
    for recording, edits, gained in zip(active, proposals, gains, strict=True):
        allowed = len(edits) if most is None else min(most, budget - len(recording.edits))
        _keep(recording, edits, gained, allowed, levels)
    logits = network(_frames([r.counts for r in active], levels))
    gained_by_all = best_wrong(logits, labels).value - before
    for recording, label, number_before, gain in zip(active, logits.argmax(1), made_before, gained_by_all, strict=True):
        recording.fooled = bool(label != recording.y)
        number_made = len(recording.edits) - number_before
        if not search.candidates:
            recording.gains[number_before:] = [float(gain) / max(number_made, 1)] * number_made


def counts_of(x: Floats, levels: int) -> Counts:
    """Return the counts [B, C, H, W] of frames x. Raises InputError unless they are whole numbers in 0..levels."""
    scaled = x.astype(np.float64) * levels
    counts = np.rint(scaled).astype(np.int64)
    if np.abs(scaled - counts).max(initial=0) > 1e-3 or counts.min(initial=0) < 0 or counts.max(initial=0) > levels:
        raise InputError(
            f"attacks on events take frames of 0 to {levels} events per pixel, as data set n-mnist makes them; these "
            f"images have other values"
        )
    return counts


def applied(counts: Counts, edits: Sequence[Edit]) -> Counts:
    """Return counts after edits."""
    flat = counts.ravel().copy()
    for out, into in edits:
        if out is not None:
            flat[out] -= 1
        if into is not None:
            flat[into] += 1
    return flat.reshape(counts.shape)


def can_lose(counts: Counts, clean: Counts) -> NDArray[np.bool_]:
    """Return where an event of the clean recording can be removed: not where an edit added one."""
    return (counts > 0) & (counts <= clean)


def can_gain(counts: Counts, clean: Counts, levels: int) -> NDArray[np.bool_]:
    """Return where an event can be added: not where an edit removed one.

    With `can_lose`, this keeps every subset of the edits made valid.
    """
    return (counts < levels) & (counts >= clean)


def _frames(counts: Sequence[Counts], levels: int) -> Floats:
    return (np.stack(counts) / levels).astype(np.float32)


def _gains(
    network: Predictor, active: Sequence[_Recording], proposals: Sequence[list[Edit]], before: Floats, levels: int
) -> list[list[float]]:
    """Return by how much each proposed edit alone lowers the margin."""
    trials = [(r, edit) for r, edits in zip(active, proposals, strict=True) for edit in edits]
    after: list[float] = []
    for start in range(0, len(trials), TRIALS):
        part = trials[start : start + TRIALS]
        logits = network(_frames([applied(r.counts, [edit]) for r, edit in part], levels))
        after += best_wrong(logits, np.array([r.y for r, _ in part])).value.tolist()
    values = iter(after)
    return [[next(values) - float(gap) for _ in edits] for gap, edits in zip(before, proposals, strict=True)]


def _keep(recording: _Recording, edits: Sequence[Edit], gains: Sequence[float], most: int, levels: int) -> None:
    """Make up to `most` edits with positive gains, largest first, leaving out those that others make impossible."""
    order = sorted((i for i, gain in enumerate(gains) if gain > 0), key=lambda i: -gains[i])
    for i in order:
        if most <= 0:
            break
        if recording.allows(edits[i], levels):
            recording.counts = applied(recording.counts, [edits[i]])
            recording.edits.append(edits[i])
            recording.gains.append(gains[i])
            most -= 1


def _reduce(network: Predictor, fooled: Sequence[_Recording], levels: int) -> None:
    """Undo the edits of the smallest gains, as many as a binary search finds while the network still errs, in place."""
    low, high = [0] * len(fooled), [len(r.edits) for r in fooled]  # `low` can be dropped, `high` cannot
    while any(b - a > 1 for a, b in zip(low, high, strict=True)):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        answers = network(_frames([r.without(drop) for r, drop in zip(fooled, middle, strict=True)], levels)).argmax(1)
        for i, (recording, label) in enumerate(zip(fooled, answers, strict=True)):
            if label != recording.y:
                low[i] = middle[i]
            else:
                high[i] = middle[i]
    for recording, dropped in zip(fooled, low, strict=True):
        order = sorted(np.argsort(recording.gains, kind="stable")[dropped:])
        recording.edits, recording.gains = [recording.edits[i] for i in order], [recording.gains[i] for i in order]
        recording.counts = applied(recording.clean, recording.edits)
