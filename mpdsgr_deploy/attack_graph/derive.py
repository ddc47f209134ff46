"""Derive the attack graph of an inference graph: the same nodes, the losses, and the backward pass."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from mpdsgr_deploy.attack_graph.jumps import find_jumps
from mpdsgr_deploy.attack_graph.layers import group
from mpdsgr_deploy.attack_graph.neurons import Neurons
from mpdsgr_deploy.attack_graph.rules import RULES
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.onnx_files import CE, CLASSES, DLR, GRADIENT, LOSS, WEIGHTED, WIDTH, read_network
from mpdsgr_deploy.surrogates import ADAPTIVE, parse_surrogate

TINY = 1e-12  # keeps DLR finite where three logits are equal
OUTPUTS = (CE, DLR, GRADIENT)  # outputs of the attack graph beside the logits


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


def attack_graph(network: onnx.ModelProto, surrogate: str, *, weighted: bool = False) -> onnx.ModelProto:
    """Derive the attack graph of an exported network, through a surrogate "KIND" or "KIND:WIDTH".

    inputs   images float32 [batch, C, H, W], then the network's noise inputs; classes int64 [batch]; width
             float32 [], which takes the place of WIDTH here (kinds without one ignore it); loss float32 []
    outputs  logits [batch, K]; ce and dlr [batch], as `losses` defines them; gradient [batch, C, H, W] of
             (1 - loss) ce + loss dlr, each image's own
    For `adaptive` each layer's state is a further input and output; see `adaptive.py`.
    weighted: the input weights float32 [batch, K] takes the place of classes and loss, and the gradient is that of
    weights . logits; ce and dlr are no outputs. This serves losses that are computed outside the graph.

    The forward nodes keep their order and precision. The backward pass is float32 throughout. It reads the weights of
    the artefact itself, so an int8 network is attacked through its rounded weights. The derivative of rounding is taken
    as 1, which is exact for the activations that export quantises. Noise, the network's further inputs, counts as
    constant; spikes of the image against noise (Poisson encoding) pass the gradient straight through. All other jumps
    are found by pattern, whichever library exported the network: see `jumps`.

    Gradients pass through resets, unless the surrogate's name ends in "+detached". With "+averaged" they do not pass
    through the membrane and are averaged over time (HART), see `Neurons`.

    The width is an input, so one graph serves any width. The kind is fixed, because a choice at run time would compute
    every kind at every neuron, where a backward pass spends most of its time. Deriving a graph for another kind takes a
    fraction of a second. The same network and kind always give the same bytes.

    Raises InputError for an unknown surrogate, for a node that no rule differentiates, and for a comparison between
    images and logits that no surrogate can replace.
    """
    kind, _, detached, averaged = parse_surrogate(surrogate)
    network = inlined(network)
    images, logits = network.graph.input[0], network.graph.output[0]
    tape = Tape(network, images.name)
    jumps = find_jumps(tape)
    neurons = Neurons(tape, jumps, group(tape, jumps), kind, detached=detached, averaged=averaged)
    states = list(tape.graph.input)[len(network.graph.input) :] if kind == ADAPTIVE else []
    batch, count = tape.shape(images.name)[0], tape.shape(logits.name)[-1]
    if not isinstance(count, int) or not tape.depends(logits.name):
        raise InputError("no attack graph: the network's output is not a vector of logits that depends on its input")
    tape.give(logits.name, WEIGHTED if weighted else _loss_gradient(tape, logits.name, count))
    for node in reversed(tape.forward):
        _differentiate(tape, neurons, node)
    gradient = tape.take(images.name)
    if gradient is None:
        raise InputError("no attack graph: no gradient reaches the images, so there is nothing to attack through")
    tape.emit("Identity", gradient, name=GRADIENT)
    del tape.graph.input[len(network.graph.input) :]
    width = helper.make_tensor_value_info(WIDTH, TensorProto.FLOAT, [])
    if weighted:
        own = [helper.make_tensor_value_info(WEIGHTED, TensorProto.FLOAT, [batch, count]), width]
    else:
        classes = helper.make_tensor_value_info(CLASSES, TensorProto.INT64, [batch])
        own = [classes, width, helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, [])]
    tape.graph.input.extend([*own, *states])
    shapes = {CE: [batch], DLR: [batch], GRADIENT: tape.shape(images.name)}
    new = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])
        for name in (OUTPUTS[-1:] if weighted else OUTPUTS)
    ]
    further = list(tape.graph.output)[1:]  # states
    del tape.graph.output[1:]
    tape.graph.output.extend([*new, *further])
    return tape.network


def _loss_gradient(tape: Tape, logits: str, count: int) -> str:
    """(1 - loss) d ce / d logits + loss d dlr / d logits [batch, K]."""
    both = losses(tape, logits, CLASSES, count)
    other = tape.emit("Sub", tape.constant(1), LOSS)
    parts = tape.emit("Mul", both.ce_gradient, other), tape.emit("Mul", both.dlr_gradient, LOSS)
    return tape.emit("Add", *parts)


def _differentiate(tape: Tape, neurons: Neurons, node: onnx.NodeProto) -> None:
    """Give a node's inputs their cotangents, if any of its outputs has one."""
    tape.node = node
    cotangents = [tape.take(output) for output in node.output]
    if any(cotangent is not None for cotangent in cotangents):
        if node in neurons:
            neurons(node, str(cotangents[0]))
        elif node.op_type in RULES and node.domain in ("", "ai.onnx"):
            RULES[node.op_type](tape, node, cotangents)
        elif any(tape.depends(value) for value in node.input):
            raise refuse(node, "is an operator without a rule for its gradient")
    neurons.before(node)


def inlined(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with its own ONNX functions replaced by their nodes."""
    return onnx.inliner.inline_local_functions(network) if network.functions else network


def derived(model: Path, surrogate: str) -> bytes:
    """Derive the attack graph of an ONNX file, as serialised bytes.

    Raises InputError as `read_network` and `attack_graph` do.
    """
    return attack_graph(read_network(model), surrogate).SerializeToString(deterministic=True)
