"""Read ONNX files of networks, and the names of values that export writes into them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from mpdsgr_deploy.errors import InputError

VIEWS = ("Identity", "Reshape", "Squeeze", "Flatten")  # operators that do not change the numbers of their input
PRODUCTS = {"Conv", "Gemm"}  # operators of products with weights in exported networks

INPUT, OUTPUT = "images", "logits"
POTENTIAL, SPIKES = "potential/", "spikes/"  # potential/LAYER/t and spikes/LAYER/t, t counted from 0

# Inputs that an attack graph adds, and its outputs in addition to the logits
CLASSES, WIDTH, LOSS = "classes", "width", "loss"
CE, DLR, GRADIENT = "ce", "dlr", "gradient"
WEIGHTED = "weights"  # input d loss / d logits of an attack graph that takes any loss
# State of the surrogate `adaptive`: inputs mean/LAYER and deviation/LAYER, outputs mean/LAYER/new, deviation/LAYER/new
MEAN, DEVIATION, NEW = "mean/", "deviation/", "/new"


def layer_of(step: str) -> str:
    """Return LAYER of a step `LAYER/t`. The name of a layer may contain slashes."""
    return step.rpartition("/")[0]


def read_network(model: Path) -> onnx.ModelProto:
    """Read an ONNX file. Raises InputError if it cannot be read or is not an ONNX file."""
    try:
        return onnx.load(model)
    except Exception as error:  # an OSError, or protobuf's DecodeError, which has no type stubs
        raise InputError(f"{model} is not an ONNX file ({type(error).__name__}); export the network again") from None


def rounds_outputs(network: onnx.ModelProto) -> bool:
    """Whether the network's output is dequantised, so that it has at most 256 different values."""
    maker = maker_of_output(network)
    return maker is not None and maker.op_type == "DequantizeLinear"


def maker_of_output(network: onnx.ModelProto, through: Collection[str] = VIEWS) -> onnx.NodeProto | None:
    """Return the last node that is not one of the operators `through`; None if these lead to an input of the graph."""
    makers = {name: node for node in network.graph.node for name in node.output}
    maker = makers.get(network.graph.output[0].name)
    while maker is not None and maker.op_type in through:
        maker = makers.get(maker.input[0])
    return maker


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or `default` if it is not set; a list becomes a tuple if `default` is one."""
    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return tuple(value) if isinstance(default, tuple) else value
    return default
