"""Write a network as an ONNX graph: unrolled over T steps, with dynamic batch, normalisation inside, named values."""

import ast
import contextlib
import io
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from mpdsgr_deploy.exporting.graph import data
from mpdsgr_deploy.exporting.tidy import tidy
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.onnx_files import INPUT, OUTPUT, POTENTIAL, PRODUCTS, SPIKES
from mpdsgr_deploy.runtime.torch_model import noise_inputs
from mpdsgr_deploy.snn import SpikingLayer

OPSET = 21  # the first with float8 in every operator of Q/DQ pairs


def to_graph(model: SpikingNet, shape: tuple[int, int, int]) -> ir.Model:
    """Export `model` (eval mode): input float32 [B, *shape] in [0, 1], output float32 logits [B, K].

    A stochastic network's `noise_inputs` are further inputs after the images. Membrane potentials and spikes are called
    `potential/LAYER/t` and `spikes/LAYER/t`, t counted from 0, and each product with weights, a node, is called by its
    layer.
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
    network = program.model
    tidy(network)
    _name(network, model)
    # its notes hold stack traces that name the exporting machine's paths, larger than a small net
    common.ClearMetadataAndDocStringPass()(network)
    return network


def save(network: ir.Model, path: Path) -> None:
    """Write a graph that passes ONNX's full check. Raises onnx's errors for one that does not."""
    proto = ir.to_proto(network)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _name(network: ir.Model, model: SpikingNet) -> None:
    """Give nodes and values the names that `to_graph` promises, from the torch modules that the exporter noted."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SpikingLayer)}
    neurons = {f"{path}.neuron": layer.name for path, layer in layers.items()}
    synapses = {f"{path}.synapse": layer.name for path, layer in layers.items()}
    steps = dict.fromkeys(neurons, 0)
    for node in network.graph:
        module = _module(node)
        if node.op_type in PRODUCTS:
            node.name = synapses.get(module, module)
        elif node.op_type == "GreaterOrEqual" and module in neurons:
            step = f"{neurons[module]}/{steps[module]}"
            steps[module] += 1
            (cast,) = (user for user in node.outputs[0].consumers() if user.op_type == "Cast")
            data(node).name, cast.outputs[0].name = POTENTIAL + step, SPIKES + step


def _module(node: ir.Node) -> str:
    """Return the path of the innermost torch module that a node comes from."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))  # modules, then the node
    return scopes[-2] if len(scopes) > 1 else ""
