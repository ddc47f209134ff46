"""One ONNX file: the network unrolled over its T steps, batch dynamic, normalisation inside."""

import contextlib
import io
import warnings
from pathlib import Path

import onnx
import torch

from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.runtime.torch_model import noise_inputs

INPUT, OUTPUT = "images", "logits"
OPSET = 20


def write_onnx(model: SpikingNet, shape: tuple[int, int, int], path: Path) -> None:
    """Write `model` (eval mode) for input float32 [B, *shape] in [0, 1] and output float32 logits [B, K].

    A stochastic network has its `noise_inputs` as further inputs, behind the images.
    """
    noise = noise_inputs(model, shape)
    example = torch.full((2, *shape), 0.5)  # two: the exporter would take a batch of one for a constant
    # absent, not empty: the exporter names the batch dimension only where each input has its dynamic shape
    further = {"noise": [torch.full((2, *entry.shape), 0.5) for entry in noise]} if noise else {}
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes about its own internals
        program = torch.onnx.export(
            model,
            (example,),
            kwargs=further,
            dynamo=True,
            dynamic_shapes={"x": batch} | {name: [batch for _ in draws] for name, draws in further.items()},
            input_names=[INPUT, *(entry.name for entry in noise)],
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
