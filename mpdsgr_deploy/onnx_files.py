"""Read ONNX files of networks, and find exported values by their names."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from mpdsgr_deploy.errors import InputError

VIEWS = ("Identity", "Reshape", "Squeeze", "Flatten")  # operators that leave every number of an output as it is
PRODUCTS = {"Conv", "Gemm"}  # operators that export writes for products with weights

INPUT, OUTPUT = "images", "logits"
POTENTIAL, SPIKES = "potential/", "spikes/"  # potential/LAYER/t and spikes/LAYER/t, t counted from 0

# Inputs that an attack graph adds, and its outputs beside the logits
CLASSES, WIDTH, LOSS = "classes", "width", "loss"
CE, DLR, GRADIENT = "ce", "dlr", "gradient"
WEIGHTED = "weights"  # input of an attack graph for any loss: d loss / d logits
# State of the surrogate `adaptive`: inputs mean/LAYER and deviation/LAYER, outputs mean/LAYER/new, deviation/LAYER/new
MEAN, DEVIATION, NEW = "mean/", "deviation/", "/new"


def layer_of(step: str) -> str:
    """Return LAYER of `LAYER/t` (`potential/LAYER/t` without its prefix); a layer's name may contain slashes."""
    return step.rpartition("/")[0]


def read_network(model: Path) -> onnx.ModelProto:
    """Read an ONNX file. Raises InputError if there is no such file."""
    try:
        return onnx.load(model)
    except Exception as error:  # an OSError, or protobuf's DecodeError, which has no type stubs
        raise InputError(f"{model} is not an ONNX file ({type(error).__name__}); export the network again") from None


def rounds_outputs(network: onnx.ModelProto) -> bool:
    """Whether the output of a network is a dequantised value, which has at most 256 levels."""
    maker = maker_of_output(network)
    return maker is not None and maker.op_type == "DequantizeLinear"


def maker_of_output(network: onnx.ModelProto, through: Collection[str] = VIEWS) -> onnx.NodeProto | None:
    """Return the last node that is not one of the operators of `through`; None if they lead to a graph input."""
    makers = {name: node for node in network.graph.node for name in node.output}
    maker = makers.get(network.graph.output[0].name)
    while maker is not None and maker.op_type in through:
        maker = makers.get(maker.input[0])
    return maker


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node; a list becomes a tuple."""
    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return tuple(value) if isinstance(default, tuple) else value
    return default
