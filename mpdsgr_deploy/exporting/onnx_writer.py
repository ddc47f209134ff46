"""Write a network as an ONNX graph: unrolled over T steps, with dynamic batch, normalisation inside, named values.

The exporter writes a step as a slice of [T, B, ...] and a sequence as a stack that is reshaped. `tidy` gets the same
values from one Split of [T*B, ...] and one Concat, which every backend runs faster.
"""

import ast
import contextlib
import io
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from mpdsgr_deploy.exporting.graph import constant, data, insert, made_by
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
    example = torch.full((2, *shape), 0.5)  # two images, because the exporter treats a batch size of one as a constant
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
        assert program is not None  # it is None only if a path was given
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


def tidy(model: ir.Model) -> None:
    """Apply every rewrite to `model` in place, and drop what nothing uses any more."""
    for rewrite in (split_steps, join_steps, cancel_views):
        for node in model.graph:
            rewrite(node)
        common.RemoveUnusedNodesPass()(model)


def split_steps(node: ir.Node) -> None:
    """Replace a Reshape to [T, B, ...] with a Slice and a Squeeze per step by one Split along the folded axis."""
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
    """Replace an Unsqueeze per step, their Concat to [T, B, ...] and its Reshape by one Concat to [T*B, ...]."""
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
    """Remove a chain of views that ends in the shape it began with."""
    end, source = node.outputs[0], _viewed(node)
    while source is not None and not end.is_graph_output():
        if source.shape == end.shape:
            end.replace_all_uses_with(source)
            return
        source = _viewed(source.producer())


def _viewed(node: ir.Node | None) -> ir.Value | None:
    """Return the value that a node shows in another shape; None if the node computes something."""
    if node is None or not node.inputs:
        return None
    whole = node.op_type == "Slice" and data(node).shape == node.outputs[0].shape
    return data(node) if whole or node.op_type in ("Reshape", "Squeeze", "Unsqueeze") else None


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new)


def _is_step_of(part: ir.Value, whole: ir.Value) -> bool:
    """Whether a value [n, ...] has the shape of [T, B, ...] without T, but for its first dimension."""
    return len(_dims(part)) > 0 and _dims(part)[1:] == _dims(whole)[2:] and len(_dims(part)) + 1 == len(_dims(whole))


def _dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    return () if value.shape is None else tuple(value.shape.dims)
