"""Derive the attack graph of an inference graph: the same nodes, the losses, and the backward pass."""

from pathlib import Path
from typing import Any, NamedTuple

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
from mpdsgr_deploy.surrogates import parse_surrogate

TINY = 1e-12  # keeps DLR finite if three logits are equal


class Losses(NamedTuple):
    """The names of the losses [B] and of their gradients in the logits [B, K]."""

    ce: str
    ce_gradient: str
    dlr: str
    dlr_gradient: str


def losses(tape: Tape, logits: str, classes: str, count: int) -> Losses:
    """Append nodes for both losses of logits z [B, K] and classes y [B], with K = `count`.

    ce     -log softmax(z)_y
    dlr    -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12), z_(k) the k-th largest logit (difference of logits
           ratio; Croce & Hein, arXiv 2003.01690). It needs three classes: with two, the difference is not divided; with
           one, it is 0.
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
        zeros = tape.emit("Mul", logits, tape.constant(0))
        return tape.emit("Squeeze", zeros, tape.integers(1), name=DLR), zeros
    ranks = min(count, 3)
    values, places = tape.emit_many("TopK", logits, tape.integers(ranks), names=2)  # [B, 3]
    largest = tape.split(values, [1] * ranks, 1)  # each [B, 1]
    places_of_largest = tape.split(places, [1] * ranks, 1)
    onehots = [_onehot(tape, tape.emit("Squeeze", place, tape.integers(1)), count) for place in places_of_largest]
    same = tape.emit("Equal", places_of_largest[0], tape.emit("Unsqueeze", classes, tape.integers(1)))
    best_wrong = tape.emit("Where", same, largest[1], largest[0])
    wrong_onehot = tape.emit("Where", same, onehots[1], onehots[0])
    gap = tape.emit("Sub", best_wrong, true)  # positive once fooled
    slope = tape.emit("Sub", wrong_onehot, onehot)
    if count == 2:
        return tape.emit("Squeeze", gap, tape.integers(1), name=DLR), slope
    spread = tape.emit("Add", tape.emit("Sub", largest[0], largest[2]), tape.constant(TINY))
    ratio = tape.emit("Div", gap, spread)
    spread_slope = tape.emit("Mul", ratio, tape.emit("Sub", onehots[0], onehots[2]))  # times the ratio
    gradient = tape.emit("Div", tape.emit("Sub", slope, spread_slope), spread)
    return tape.emit("Squeeze", ratio, tape.integers(1), name=DLR), gradient


def _onehot(tape: Tape, classes: str, count: int) -> str:
    """Append nodes for the one-hot encoding, float32 [B, K], of classes int64 [B]; K = `count`."""
    wide = tape.emit("Unsqueeze", classes, tape.integers(1))
    return tape.emit("Cast", tape.emit("Equal", wide, tape.constant(np.arange(count), np.int64)), to=TensorProto.FLOAT)


def _total(tape: Tape, value: str) -> str:
    """Append a node for the sum over classes, from [B, K] to [B, 1]."""
    return tape.emit("ReduceSum", value, tape.integers(1), keepdims=1)


def attack_graph(network: onnx.ModelProto, surrogate: str, *, weighted: bool = False) -> onnx.ModelProto:
    """Derive the attack graph of an exported network, through a surrogate "KIND" or "KIND:WIDTH".

    inputs   images float32 [batch, C, H, W], then the network's noise inputs; classes int64 [batch]; width float32 [],
             which replaces the WIDTH of `surrogate` (kinds without a width ignore it); loss float32 []
    outputs  logits [batch, K]; ce and dlr [batch], as `losses` defines them; gradient [batch, C, H, W] of each image's
             (1 - loss) ce + loss dlr
    For the surrogate `adaptive`, the state of each layer is a further input and output; see `adaptive.py`.
    weighted: the input weights float32 [batch, K] replaces classes and loss, the gradient is that of weights . logits,
    and ce and dlr are not computed. This serves losses that are computed outside the graph.

    The forward nodes keep their order and precision; the backward pass is float32. It reads the weights of the artefact
    itself, so an int8 network is attacked through its rounded weights. The derivative of rounding is taken as 1, which
    is exact for the activations that export quantises. The noise inputs count as constant; spikes that compare the
    image with noise (Poisson encoding) pass the gradient straight through. All other jumps are recognised by their
    pattern, whichever library exported the network; see `jumps`.

    Gradients pass through resets, unless the surrogate's name ends in "+detached". With "+averaged" they are averaged
    over time and do not pass through the membrane (HART); see `Neurons`.

    The width is an input, so one graph serves any width. The kind is fixed, because a choice at run time would compute
    every kind at every neuron, and neurons take most of the time of a backward pass. Deriving a graph for another kind
    takes a fraction of a second. The same network and kind always give the same bytes.

    Raises InputError for an unknown surrogate, for a node that no rule differentiates, and for a comparison between
    images and logits that no surrogate can replace.
    """
    kind, _, detached, averaged = parse_surrogate(surrogate)
    network = inlined(network)
    images, logits = network.graph.input[0], network.graph.output[0]
    tape = Tape(network, images.name)
    jumps = find_jumps(tape)
    batch, count = tape.shape(images.name)[0], tape.shape(logits.name)[-1]
    if not isinstance(count, int) or not tape.depends(logits.name):
        raise InputError("no attack graph: the network's output is not a vector of logits that depends on its input")
    # before the state of the surrogate `adaptive`, which follows them in the graph
    inputs: dict[str, Any] = {WEIGHTED: [batch, count], WIDTH: []}
    outputs: dict[str, Any] = {GRADIENT: tape.shape(images.name)}
    if not weighted:
        inputs, outputs = {CLASSES: [batch], WIDTH: [], LOSS: []}, {CE: [batch], DLR: [batch], **outputs}
    for name, shape in inputs.items():
        dtype = TensorProto.INT64 if name == CLASSES else TensorProto.FLOAT
        tape.graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    for name, shape in outputs.items():
        tape.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    neurons = Neurons(tape, jumps, group(tape, jumps), kind, detached=detached, averaged=averaged)
    tape.give(logits.name, WEIGHTED if weighted else _loss_gradient(tape, logits.name, count))
    for node in reversed(tape.forward):
        _differentiate(tape, neurons, node)
    gradient = tape.take(images.name)
    if gradient is None:
        raise InputError("no attack graph: no gradient reaches the images, so there is nothing to attack through")
    tape.emit("Identity", gradient, name=GRADIENT)
    return tape.network


def _loss_gradient(tape: Tape, logits: str, count: int) -> str:
    """Append nodes for (1 - loss) d ce / d logits + loss d dlr / d logits [batch, K]."""
    both = losses(tape, logits, CLASSES, count)
    other = tape.emit("Sub", tape.constant(1), LOSS)
    parts = tape.emit("Mul", both.ce_gradient, other), tape.emit("Mul", both.dlr_gradient, LOSS)
    return tape.emit("Add", *parts)


def _differentiate(tape: Tape, neurons: Neurons, node: onnx.NodeProto) -> None:
    """Pass cotangents on to the inputs of a node, if any of its outputs has one."""
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
    """Return the network with every call of a local ONNX function replaced by the function's nodes."""
    return onnx.inliner.inline_local_functions(network) if network.functions else network


def derived(model: Path, surrogate: str) -> bytes:
    """Return the attack graph of an ONNX file, as serialised bytes.

    Raises InputError for a file that is not an ONNX network, and as `attack_graph` does.
    """
    return attack_graph(read_network(model), surrogate).SerializeToString(deterministic=True)
