"""One ONNX file: the network unrolled over its T steps, batch dynamic, normalisation inside."""

import contextlib
import io
import warnings
from pathlib import Path

import onnx
import torch

from mpdsgr_deploy.models import SpikingNet

INPUT, OUTPUT = "images", "logits"
OPSET = 20


def write_onnx(model: SpikingNet, shape: tuple[int, int, int], path: Path) -> None:
    """Write `model` (eval mode) for input float32 [B, *shape] in [0, 1] and output float32 logits [B, K]."""
    example = torch.full((2, *shape), 0.5)  # two: the exporter would take a batch of one for a constant
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes about its own internals
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None  # None only where a path is given
    network = program.model_proto
    _strip_metadata(network)
    onnx.checker.check_model(network, full_check=True)
    onnx.save(network, path)


def _strip_metadata(network: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces that name the exporting machine's paths, larger than a small net."""
    graph = network.graph
    for part in (network, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
