"""Find values of a graph that lie on a known grid for every image: spikes are 0 or 1, pooled spikes multiples of 1/4.

Such activations are quantised without any loss and without calibration images.
"""

from math import prod
from typing import NamedTuple

import onnx_ir as ir

from mpdsgr_deploy.exporting.graph import data

SAME_VALUES = {"Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze"}
SAME_VALUES |= {"Transpose", "Unsqueeze"}


class Grid(NamedTuple):
    """The values 0, step, 2 step, ..., levels * step."""

    step: float
    levels: int


def grids(model: ir.Model) -> dict[ir.Value, Grid]:
    """Return the grid of every value that provably has one."""
    known: dict[ir.Value, Grid] = {}
    for node in model.graph:
        grid = _grid(node, known)
        if grid is not None:
            known.update(dict.fromkeys(node.outputs, grid))
    return known


def _grid(node: ir.Node, known: dict[ir.Value, Grid]) -> Grid | None:
    if node.op_type == "Cast" and data(node).dtype == ir.DataType.BOOL:
        return Grid(1.0, 1)
    values = node.inputs if node.op_type in ("Concat", "Mul") else node.inputs[:1]  # the others only shape or choose
    inputs = [known[value] for value in values if value in known]
    if len(inputs) < len(values) or not inputs:
        return None
    if node.op_type in SAME_VALUES and len({grid.step for grid in inputs}) == 1:
        return max(inputs)
    if node.op_type == "Mul":  # gated spikes
        return Grid(inputs[0].step * inputs[1].step, inputs[0].levels * inputs[1].levels)
    averaged = _averaged(node)
    return Grid(inputs[0].step / averaged, inputs[0].levels * averaged) if averaged else None


def _averaged(node: ir.Node) -> int:
    """Return the window size of an average pooling; 0 for any other node.

    A global average counts as another node, because no format would hold its grid.
    """
    if node.op_type != "AveragePool":
        return 0
    ceil = node.attributes.get("ceil_mode")
    padded = any(node.attributes.get_ints("pads", [])) or (ceil is not None and ceil.as_int())
    return 0 if padded else prod(node.attributes.get_ints("kernel_shape"))
