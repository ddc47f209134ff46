"""Write a network as an ONNX graph: unrolled over T steps, with a dynamic batch and with its input normalisation.

torch's exporter writes a time step as a slice of [T, B, ...], and joins steps by a stack and a reshape. `tidy` gets the
same values from one Split of [T*B, ...] and one Concat, which every backend runs faster.
"""

import ast
import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from mpdsgr_deploy.exporting.graph import constant, data, insert, made_by
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.onnx_files import INPUT, OUTPUT, POTENTIAL, PRODUCTS, SPIKES
from mpdsgr_deploy.runtime.torch_model import noise_inputs
from mpdsgr_deploy.snn import SpikingLayer

OPSET = 21  # the first with float8 in every operator of Q/DQ pairs
DYNAMIC = {0: torch.export.Dim("batch")}  # the dynamic axis of every input


def to_graph(model: SpikingNet, shape: tuple[int, int, int]) -> ir.Model:
    """Export `model`, which is in eval mode: from images float32 [B, *shape] in [0, 1] to logits float32 [B, K].

    A stochastic network's `noise_inputs` are further inputs after the images. The values of membrane potentials and
    spikes are named `potential/LAYER/t` and `spikes/LAYER/t`, with t counted from 0; the node of each product with
    weights has the name of its layer.
    """
    noise = noise_inputs(model, shape)
    example = torch.full((2, *shape), 0.5)  # two images, because the exporter treats a batch size of one as a constant
    # left out instead of empty: the exporter names the batch dimension only if every input has a dynamic shape
    further = {"noise": [torch.full((2, *entry.shape), 0.5) for entry in noise]} if noise else {}
    shapes = {"x": DYNAMIC} | {name: [DYNAMIC for _ in draws] for name, draws in further.items()}
    network = traced(model, example, further, shapes=shapes, noise=[entry.name for entry in noise])
    tidy(network)
    _name_nodes(network, model)
    # the exporter's notes hold stack traces with paths of this machine, and may be larger than the network
    common.ClearMetadataAndDocStringPass()(network)
    return network


def traced(
    module: nn.Module, example: Tensor, further: Mapping[str, Any], *, shapes: Any, noise: Sequence[str] = ()
) -> ir.Model:
    """Return the graph that torch's exporter makes of a module, with its notes, from INPUT and `noise` to OUTPUT.

    example: images [B, C, H, W]; further: keyword arguments; shapes: the exporter's `dynamic_shapes` of both.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes about its own internals
        program = torch.onnx.export(
            module,
            (example,),
            kwargs=dict(further),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[INPUT, *noise],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # it is None only if a path was given
    return program.model


def save(network: ir.Model, path: Path) -> None:
    """Write a graph to a file. Raises onnx's errors, before it writes, if the graph fails ONNX's full check."""
    proto = ir.to_proto(network)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _name_nodes(network: ir.Model, model: SpikingNet) -> None:
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


def tidy(model: ir.Model) -> None:
    """Apply every rewrite to `model` in place, and remove the nodes that nothing uses any more."""
    for rewrite in (split_steps, join_steps, cancel_views):
        for node in model.graph:
            rewrite(node)
        common.RemoveUnusedNodesPass()(model)


def split_steps(node: ir.Node) -> None:
    """Replace a Reshape to [T, B, ...], followed by a Slice and a Squeeze per step, by one Split along the axis T*B."""
    if node.op_type != "Reshape" or not _is_step_of(data(node), node.outputs[0]):
        return
    steps: dict[int, ir.Value] = {}
    for user in node.outputs[0].consumers():
        views = user.outputs[0].consumers()
        start = constant(user.inputs[1]) if user.op_type == "Slice" else None
        if start is None or [view.op_type for view in views] != ["Squeeze"]:
            return
        step = views[0].outputs[0]
        if not _is_step_of(step, node.outputs[0]):
            return
        steps[int(start[0])] = step
    if len(steps) > 1 and len(steps) == _dims(node.outputs[0])[0]:
        split = insert(node, "Split", [data(node)], {"axis": 0, "num_outputs": len(steps)}, len(steps))
        for t, step in steps.items():
            _replace(step, split[t])


def join_steps(node: ir.Node) -> None:
    """Replace an Unsqueeze per step, a Concat to [T, B, ...] and a Reshape by one Concat to [T*B, ...]."""
    stacked = [made_by(value, "Unsqueeze") for value in node.inputs]
    steps = [data(unsqueeze) for unsqueeze in stacked if unsqueeze is not None]
    if node.op_type != "Concat" or len(steps) < len(stacked) or not _is_step_of(steps[0], node.outputs[0]):
        return
    for user in node.outputs[0].consumers():
        target = constant(user.inputs[1]) if user.op_type == "Reshape" else None
        if target is None or not target.all():  # a 0 would copy a dimension that no longer exists
            continue
        (joined,) = insert(user, "Concat", steps, {"axis": 0})
        joined.type = steps[0].type
        if _dims(user.outputs[0])[1:] == _dims(steps[0])[1:]:
            _replace(user.outputs[0], joined)
        else:
            user.replace_input_with(0, joined)


def cancel_views(node: ir.Node) -> None:
    """Remove a chain of views that ends in the shape with which it began."""
    end, source = node.outputs[0], _viewed(node)
    while source is not None and not end.is_graph_output():
        if source.shape == end.shape:
            end.replace_all_uses_with(source)
            return
        source = _viewed(source.producer())


def _viewed(node: ir.Node | None) -> ir.Value | None:
    """Return the input of a node that only changes its shape; None for a node that computes something."""
    if node is None or not node.inputs:
        return None
    whole = node.op_type == "Slice" and data(node).shape == node.outputs[0].shape
    return data(node) if whole or node.op_type in ("Reshape", "Squeeze", "Unsqueeze") else None


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new)


def _is_step_of(part: ir.Value, whole: ir.Value) -> bool:
    """Whether `part` [n, ...] has the dimensions that follow [T, B] in `whole` [T, B, ...], whatever n is."""
    return len(_dims(part)) > 0 and _dims(part)[1:] == _dims(whole)[2:] and len(_dims(part)) + 1 == len(_dims(whole))


def _dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    return () if value.shape is None else tuple(value.shape.dims)
