"""ONNX files of networks: how they are read, and the names by which exported values are found again."""

from pathlib import Path

import onnx

from mpdsgr_deploy.errors import InputError

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
    """LAYER of `LAYER/t`, `potential/LAYER/t` without its prefix; a layer's name may have slashes of its own."""
    return step.rpartition("/")[0]


def read_network(model: Path) -> onnx.ModelProto:
    """An ONNX file. Raises InputError if there is no such file."""
    try:
        return onnx.load(model)
    except Exception as error:  # protobuf's DecodeError, of a package without types, or an OSError
        raise InputError(f"{model} is not an ONNX file ({type(error).__name__}); export again") from None


def rounds_outputs(network: onnx.ModelProto) -> bool:
    """Whether the output of a network is a dequantised value, which takes 256 levels at most."""
    makers = {name: node for node in network.graph.node for name in node.output}
    maker = makers.get(network.graph.output[0].name)
    while maker is not None and maker.op_type in ("Identity", "Reshape", "Squeeze", "Flatten"):
        maker = makers.get(maker.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"
