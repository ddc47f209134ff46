"""Exact rewrites of the exported graph: time steps are split and joined without shape arithmetic.

The exporter writes a step as a slice of [T, B, ...] and a sequence as a stack that is reshaped. The same values come
from one Split of [T*B, ...] and one Concat, which every backend runs faster.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from mpdsgr_deploy.exporting.graph import constant, data, insert, made_by


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
        if target is None or not target.all():  # a 0 would copy a dimension that is no longer there
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
