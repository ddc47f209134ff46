"""The losses that an attack maximises, and their gradients in the logits."""

from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from mpdsgr_deploy.attack_graph.tape import Tape
from mpdsgr_deploy.onnx_files import CE, DLR

TINY = 1e-12  # keeps DLR finite where three logits are equal


class Losses(NamedTuple):
    """Names of values: each loss [B], and its gradient in the logits [B, K]."""

    ce: str
    ce_gradient: str
    dlr: str
    dlr_gradient: str


def losses(tape: Tape, logits: str, classes: str, count: int) -> Losses:
    """Add both losses of logits z [B, K] and classes y [B] to the graph, K = `count`.

    ce     -log softmax(z)_y
    dlr    -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12), z_(k) the k-th largest logit (difference of logits
           ratio; Croce & Hein, arXiv 2003.01690). It needs three classes: with two the difference is not divided, and
           with one class, which no attack can miss, it is 0.
    """
    onehot = _onehot(tape, classes, count)  # [B, K]
    true = _total(tape, tape.emit("Mul", logits, onehot))  # z_y [B, 1]
    log_softmax = tape.emit("LogSoftmax", logits, axis=1)
    share = _total(tape, tape.emit("Mul", log_softmax, onehot))
    ce = tape.emit("Neg", tape.emit("Squeeze", share, tape.integers(1)), name=CE)
    ce_gradient = tape.emit("Sub", tape.emit("Softmax", logits, axis=1), onehot)
    return Losses(ce, ce_gradient, *_dlr(tape, logits, classes, onehot, true, count))


def _dlr(tape: Tape, logits: str, classes: str, onehot: str, true: str, count: int) -> tuple[str, str]:
    if count == 1:
        nothing = tape.emit("Mul", logits, tape.constant(0))
        return tape.emit("Squeeze", nothing, tape.integers(1), name=DLR), nothing
    ranks = min(count, 3)
    values, places = tape.emit_many("TopK", logits, tape.integers(ranks), names=2)  # [B, 3]
    largest = tape.split(values, [1] * ranks, 1)  # each [B, 1]
    where = tape.split(places, [1] * ranks, 1)
    hots = [_onehot(tape, tape.emit("Squeeze", place, tape.integers(1)), count) for place in where]
    same = tape.emit("Equal", where[0], tape.emit("Unsqueeze", classes, tape.integers(1)))
    best_wrong = tape.emit("Where", same, largest[1], largest[0])
    wrong_hot = tape.emit("Where", same, hots[1], hots[0])
    gap = tape.emit("Sub", best_wrong, true)  # positive once fooled
    slope = tape.emit("Sub", wrong_hot, onehot)
    if count == 2:
        return tape.emit("Squeeze", gap, tape.integers(1), name=DLR), slope
    spread = tape.emit("Add", tape.emit("Sub", largest[0], largest[2]), tape.constant(TINY))
    ratio = tape.emit("Div", gap, spread)
    turn = tape.emit("Mul", ratio, tape.emit("Sub", hots[0], hots[2]))  # d spread, times the ratio
    gradient = tape.emit("Div", tape.emit("Sub", slope, turn), spread)
    return tape.emit("Squeeze", ratio, tape.integers(1), name=DLR), gradient


def _onehot(tape: Tape, classes: str, count: int) -> str:
    """One-hot float32 [B, K] of classes int64 [B]."""
    wide = tape.emit("Unsqueeze", classes, tape.integers(1))
    return tape.emit("Cast", tape.emit("Equal", wide, tape.constant(np.arange(count), np.int64)), to=TensorProto.FLOAT)


def _total(tape: Tape, value: str) -> str:
    """The sum over classes: [B, K] to [B, 1]."""
    return tape.emit("ReduceSum", value, tape.integers(1), keepdims=1)
