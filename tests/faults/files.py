"""The ONNX file says one thing and does another: operators, types and numbers that are not what their names say."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from faults.planted import Planted, fault

LOCAL = "local"


def halving(network: onnx.ModelProto, name: str) -> None:
    """Let the first multiplication be one of the file's own, called Mul, that halves."""
    body = [
        helper.make_node("Mul", ["a", "b"], ["product"]),
        helper.make_node("Constant", [], ["half"], value=helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])),
        helper.make_node("Mul", ["product", "half"], ["c"]),
    ]
    opset = next(entry for entry in network.opset_import if entry.domain == "")
    network.functions.append(helper.make_function(LOCAL, name, ["a", "b"], ["c"], body, [opset]))
    network.opset_import.append(helper.make_opsetid(LOCAL, 1))
    next(node for node in network.graph.node if node.op_type == name).domain = LOCAL


def round_logits(copy: Planted, kind: int) -> None:
    """Behind the network, logits in another type and back."""
    copy.append(
        helper.make_node("Cast", ["raw"], ["rounded"], name="rounding", to=kind),
        helper.make_node("Cast", ["rounded"], ["logits"], to=TensorProto.FLOAT),
    )


@fault("artefact", 3, "check 16", precision="int8")
def multiplication_that_halves(copy: Planted) -> None:
    """An operator of the file's own under a standard name: the leak of the int8 file is half of float32's."""
    network = copy.load()
    halving(network, "Mul")
    copy.store(network)


@fault("artefact", 3, "check 16", precision="int8")
def potentials_in_bfloat16(copy: Planted) -> None:
    """A compressor that casts what the manifest says is float32 to bfloat16 and back."""
    round_logits(copy, TensorProto.BFLOAT16)


@fault("artefact", 2, "compares values that depend on the images", precision="int8", thorough=True)
def potentials_in_float8(copy: Planted) -> None:
    """The same in float8, in a file that has int8 alone."""
    round_logits(copy, TensorProto.FLOAT8E4M3FN)


@fault("artefact", 3, "check 16")
def numbers_in_another_file(copy: Planted) -> None:
    """Weights beside the file, which no hash covers: they can be changed after the validation."""
    network = copy.load()
    onnx.save(
        network,
        copy.path / "model.fp32.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=256,  # shapes stay in the file, or no runtime loads it
    )
    copy.answered_anew.add("fp32")


@fault("artefact", 3, "check 12")
def dead_network(copy: Planted) -> None:
    """A readout of zeros: every image has the same logits."""
    copy.change("readout.weight", np.zeros_like)
