"""From an inference graph to its attack graph: the same nodes, the losses, and the backward pass."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from mpdsgr_deploy.attack_graph.losses import losses
from mpdsgr_deploy.attack_graph.neurons import Neurons
from mpdsgr_deploy.attack_graph.rules import RULES
from mpdsgr_deploy.attack_graph.tape import Tape, refuse
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.onnx_files import CE, CLASSES, DLR, GRADIENT, LOSS, WIDTH, read_network
from mpdsgr_deploy.surrogates import ADAPTIVE, parse_surrogate

OUTPUTS = (CE, DLR, GRADIENT)  # beside the logits


def attack_graph(network: onnx.ModelProto, surrogate: str) -> onnx.ModelProto:
    """The attack graph of an exported network, through a surrogate "KIND" or "KIND:WIDTH".

    inputs   images float32 [batch, C, H, W], then the network's noise, as they are; classes int64 [batch]; width
             float32 [], which takes the place of WIDTH here (kinds without one ignore it); loss float32 []
    outputs  logits [batch, K]; ce and dlr [batch], as `losses` defines them; gradient [batch, C, H, W] of
             (1 - loss) ce + loss dlr, each image's own
    `adaptive` has a state for each layer beside them, in and out; see `adaptive.py`.

    The forward nodes stand there as they are, in the precision they have. The backward pass is float32 throughout. It
    takes the weights from the artefact itself, once stored, so an int8 network is attacked through its rounded weights;
    rounding itself is taken for the identity, which it is for the exact activations that export quantises. Noise counts
    as constant; spikes of the image against noise (Poisson encoding) pass the gradient straight through.

    The width is an input, so one graph serves any; the kind is not, for a choice at run time would compute every kind
    at every neuron, and the neurons are what a backward pass spends its time on. To try another kind, derive another
    graph: it takes a fraction of a second. The result depends on `network` and the kind alone, to the last byte.

    Raises InputError for an unknown surrogate and for a node that no rule differentiates.
    """
    kind = parse_surrogate(surrogate).kind
    images, logits = network.graph.input[0], network.graph.output[0]
    tape = Tape(network, images.name)
    neurons = Neurons(tape, kind)
    states = list(tape.graph.input)[len(network.graph.input) :] if kind == ADAPTIVE else []
    batch, count = tape.shape(images.name)[0], tape.shape(logits.name)[-1]
    if not isinstance(count, int) or not tape.depends(logits.name):
        raise InputError("no attack graph: the network's output is no vector of logits that depends on its input")
    found = losses(tape, logits.name, CLASSES, count)
    other = tape.emit("Sub", tape.constant(1), LOSS)
    parts = tape.emit("Mul", found.ce_gradient, other), tape.emit("Mul", found.dlr_gradient, LOSS)
    tape.give(logits.name, tape.emit("Add", *parts))
    for node in reversed(tape.forward):
        _differentiate(tape, neurons, node)
    gradient = tape.take(images.name)
    if gradient is None:
        raise InputError("no attack graph: no gradient reaches the images")
    tape.emit("Identity", gradient, name=GRADIENT)
    del tape.graph.input[len(network.graph.input) :]
    tape.graph.input.extend(
        [
            helper.make_tensor_value_info(CLASSES, TensorProto.INT64, [batch]),
            helper.make_tensor_value_info(WIDTH, TensorProto.FLOAT, []),
            helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, []),
            *states,
        ]
    )
    shapes = [[batch], [batch], tape.shape(images.name)]
    new = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(OUTPUTS, shapes, strict=True)
    ]
    further = list(tape.graph.output)[1:]  # states
    del tape.graph.output[1:]
    tape.graph.output.extend([*new, *further])
    return tape.network


def _differentiate(tape: Tape, neurons: Neurons, node: onnx.NodeProto) -> None:
    """Give a node's inputs their cotangents, if any of its outputs has one."""
    cotangents = [tape.take(output) for output in node.output]
    if any(cotangent is not None for cotangent in cotangents):
        fires = tape.makers.get(node.input[0]) if node.op_type == "Cast" else None
        if node in neurons:
            neurons(node, str(cotangents[0]))
        elif fires is not None and fires.op_type == "GreaterOrEqual":
            _straight_through(tape, fires, str(cotangents[0]))
        elif node.op_type in RULES:
            RULES[node.op_type](tape, node, cotangents)
        elif any(tape.depends(value) for value in node.input):
            raise refuse(node, "is an operator without a rule for its gradient")
    neurons.before(node)


def _straight_through(tape: Tape, fires: onnx.NodeProto, cotangent: str) -> None:
    """Spikes [x >= noise] of an encoding, whose mean is x."""
    pixels, noise = fires.input
    if tape.depends(noise):
        raise refuse(fires, "compares with what depends on the images")
    tape.give(pixels, tape.unbroadcast(cotangent, pixels, fires.output[0]))


def derived(model: Path, surrogate: str) -> bytes:
    """The attack graph of an ONNX file, as the bytes of one.

    Raises InputError as `read_network` and `attack_graph` do.
    """
    return attack_graph(read_network(model), surrogate).SerializeToString(deterministic=True)
