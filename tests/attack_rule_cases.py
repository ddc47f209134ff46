"""Networks of single operators, for the rules by which their gradients are derived."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAW = np.random.default_rng(0)
W = {
    "w": DRAW.normal(0, 0.4, (6, 4, 3, 2)).astype(np.float32),  # of a convolution from 4 to 6 channels
    "g": DRAW.normal(0, 0.4, (6, 2, 3, 3)).astype(np.float32),  # in two groups
    "t": DRAW.normal(0, 0.4, (4, 2, 3, 3)).astype(np.float32),  # transposed
    "m": DRAW.normal(0, 0.4, (6, 5)).astype(np.float32),
    "c": DRAW.normal(0, 1, (4, 1, 1)).astype(np.float32),
    "row": DRAW.normal(1, 0.2, (6,)).astype(np.float32),
    "bias": DRAW.normal(0, 0.2, (6,)).astype(np.float32),
}
T = {name: torch.from_numpy(array) for name, array in W.items()}
COUNT = 5  # images
Node = tuple[str, list[object], dict[str, object]]  # operator, inputs (x, y1, y2... or constants), attributes
Function = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    nodes: list[Node]
    torch: Function
    opset: int = 21


def one(
    op: str, *inputs: object, opset: int = 21, smooth: bool = True, f: Callable[[Tensor], Tensor], **attrs: object
) -> Case:
    return Case([(op, ["x", *inputs], attrs)], f, opset)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES = {
    "relu": one("Relu", f=F.relu),
    "leaky relu": one("LeakyRelu", alpha=0.2, f=lambda x: F.leaky_relu(x, 0.2)),
    "prelu": one("PRelu", "c", f=lambda x: torch.where(x > 0, x, x * T["c"])),
    "elu": one("Elu", alpha=0.7, f=lambda x: F.elu(x, 0.7)),
    "clip": one("Clip", np.float32(-0.5), np.float32(0.6), f=lambda x: x.clamp(-0.5, 0.6)),
    "sigmoid": one("Sigmoid", f=torch.sigmoid),
    "hard sigmoid": one("HardSigmoid", alpha=1 / 6, beta=0.5, f=F.hardsigmoid),
    "hard swish": one("HardSwish", f=F.hardswish),
    "softplus": one("Softplus", f=F.softplus),
    "tanh": one("Tanh", f=torch.tanh),
    "erf": one("Erf", f=torch.erf),
    "gelu": one("Gelu", f=F.gelu),
    "gelu by tanh": one("Gelu", approximate="tanh", f=lambda x: F.gelu(x, approximate="tanh")),
    "exp": one("Exp", f=torch.exp),
    "log": Case(
        [("Exp", ["x"], {}), ("Add", ["y0", np.float32(1)], {}), ("Log", ["y1"], {})], lambda x: (x.exp() + 1).log()
    ),
    "sqrt": Case([("Exp", ["x"], {}), ("Sqrt", ["y0"], {})], lambda x: x.exp().sqrt()),
    "reciprocal": Case([("Exp", ["x"], {}), ("Reciprocal", ["y0"], {})], lambda x: 1 / x.exp()),
    "abs and neg": Case([("Abs", ["x"], {}), ("Neg", ["y0"], {})], lambda x: -x.abs()),
    "pow": one("Pow", np.float32(3), f=lambda x: x**3),
    "divided by": Case([("Exp", ["x"], {}), ("Div", ["x", "y0"], {})], lambda x: x / x.exp()),
    "max of two": Case([("Mul", ["x", "x"], {}), ("Max", ["x", "y0"], {})], lambda x: torch.maximum(x, x * x)),
    "min with a constant": one("Min", np.float32(0.3), f=lambda x: x.clamp(max=0.3)),
    "sum and mean": Case([("Sum", ["x", "x", "c"], {}), ("Mean", ["y0", "x"], {})], lambda x: (2 * x + T["c"] + x) / 2),
    "broadcast": Case(
        [("ReduceMean", ["x", i64(1)], {}), ("Mul", ["x", "y0"], {})], lambda x: x * x.mean(1, keepdim=True)
    ),
    "softmax": one("Softmax", axis=1, f=lambda x: x.softmax(1)),
    "log softmax": one("LogSoftmax", axis=-1, f=lambda x: x.log_softmax(-1)),
    "layer norm": one("LayerNormalization", "row", "bias", f=lambda x: F.layer_norm(x, (6,), T["row"], T["bias"])),
    "instance norm": one(
        "InstanceNormalization",
        W["row"][:4],
        W["bias"][:4],
        f=lambda x: F.instance_norm(x, None, None, T["row"][:4], T["bias"][:4]),
    ),
    "batch norm": one(
        "BatchNormalization",
        W["row"][:4],
        W["bias"][:4],
        W["bias"][:4],
        W["row"][:4],
        f=lambda x: F.batch_norm(x, T["bias"][:4], T["row"][:4], T["row"][:4], T["bias"][:4]),
    ),
    "conv": one("Conv", "w", pads=[1, 0, 1, 0], f=lambda x: F.conv2d(x, T["w"], padding=(1, 0))),
    "conv with much padding": one("Conv", "w", pads=[3, 3, 3, 3], f=lambda x: F.conv2d(x, T["w"], padding=3)),
    "conv in steps": one(
        "Conv", "w", strides=[2, 3], pads=[1, 1, 1, 1], f=lambda x: F.conv2d(x, T["w"], stride=(2, 3), padding=1)
    ),
    "conv in groups": one(
        "Conv",
        "g",
        group=2,
        dilations=[2, 1],
        pads=[1, 1, 1, 1],
        f=lambda x: F.conv2d(x, T["g"], groups=2, dilation=(2, 1), padding=1),
    ),
    "conv by channel": one(
        "Conv", W["g"][:4, :1], group=4, strides=[2, 2], f=lambda x: F.conv2d(x, T["g"][:4, :1], groups=4, stride=2)
    ),
    "conv same": one("Conv", "w", auto_pad="SAME_UPPER", f=lambda x: F.conv2d(F.pad(x, (0, 1, 1, 1)), T["w"])),
    "conv transposed": one(
        "ConvTranspose",
        "t",
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        output_padding=[1, 1],
        f=lambda x: F.conv_transpose2d(x, T["t"], stride=2, padding=1, output_padding=1),
    ),
    "matmul": one("MatMul", "m", f=lambda x: x @ T["m"]),
    "attention": Case(
        [("Transpose", ["x"], {"perm": [0, 1, 3, 2]}), ("MatMul", ["x", "y0"], {})], lambda x: x @ x.transpose(2, 3)
    ),
    "max pool": one("MaxPool", kernel_shape=[2, 2], strides=[2, 2], f=lambda x: F.max_pool2d(x, 2)),
    "max pool that overlaps": one(
        "MaxPool",
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        f=lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    "max pool rounded up": one(
        "MaxPool",
        kernel_shape=[3, 2],
        strides=[2, 2],
        ceil_mode=1,
        f=lambda x: F.max_pool2d(x, (3, 2), 2, ceil_mode=True),
    ),
    "max pool dilated": one(
        "MaxPool",
        kernel_shape=[2, 2],
        dilations=[2, 3],
        f=lambda x: F.max_pool2d(x, 2, 1, dilation=(2, 3)),
    ),
    "average pool": one("AveragePool", kernel_shape=[2, 2], strides=[2, 2], f=lambda x: F.avg_pool2d(x, 2)),
    "average pool that overlaps": one(
        "AveragePool",
        kernel_shape=[3, 3],
        strides=[2, 1],
        pads=[1, 1, 1, 1],
        f=lambda x: F.avg_pool2d(x, 3, (2, 1), 1, count_include_pad=False),
    ),
    "average pool with zeros": one(
        "AveragePool",
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        count_include_pad=1,
        f=lambda x: F.avg_pool2d(x, 3, 2, 1),
    ),
    "global average": one("GlobalAveragePool", f=lambda x: x.mean((2, 3), keepdim=True)),
    "reduce over two": one("ReduceSum", i64(1, 3), keepdims=0, f=lambda x: x.sum((1, 3))),
    "reduce max": one("ReduceMax", i64(2), keepdims=0, f=lambda x: x.amax(2)),
    "pad": one("Pad", i64(0, 0, 1, 2, 0, 0, 2, 0), np.float32(0.5), f=lambda x: F.pad(x, (2, 0, 1, 2), value=0.5)),
    "pad by reflection": one(
        "Pad", i64(0, 0, 2, 1, 0, 0, 1, 2), mode="reflect", f=lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect")
    ),
    "gather one": one("Gather", np.array(2), axis=1, f=lambda x: x[:, 2]),
    "gather many": one("Gather", i64(3, 0, 0), axis=2, f=lambda x: x[:, :, [3, 0, 0]]),
    "gather a table": one("Gather", np.array([[0, 2], [3, 3]]), axis=2, f=lambda x: x[:, :, [[0, 2], [3, 3]]]),
    "gather by several arrays": Case(
        [
            ("Transpose", ["x"], {"perm": [2, 3, 0, 1]}),
            ("GatherND", ["y0", np.array([[[0, 2]], [[3, 5]], [[0, 2]]])], {}),
            ("Transpose", ["y1"], {"perm": [2, 3, 0, 1]}),
        ],
        lambda x: x.permute(2, 3, 0, 1)[[[0], [3], [0]], [[2], [5], [2]]].permute(2, 3, 0, 1),
    ),
    "gather at run time": Case(
        [
            ("Shape", ["x"], {"start": 0, "end": 1}),
            ("Sub", ["y0", i64(1)], {}),
            ("Gather", ["x", "y1"], {}),
            ("Add", ["x", "y2"], {}),
        ],
        lambda x: x + x[-1:],
    ),
    "split": Case(
        [("Split", ["x", i64(3, 4)], {"axis": 2, "outputs": 2}), ("Concat", ["y0_1", "y0", "y0"], {"axis": 2})],
        lambda x: torch.cat([x[:, :, 3:], x[:, :, :3], x[:, :, :3]], 2),
    ),
    "slice in steps": one(
        "Slice", i64(1, 5), i64(7, -7), i64(2, 3), i64(2, -2), f=lambda x: x[:, :, 1:7:2].flip(3)[..., ::2]
    ),
    "expand": Case(
        [("ReduceMean", ["x", i64(2, 3)], {}), ("Expand", ["y0", i64(1, 4, 7, 6)], {}), ("Mul", ["y1", "x"], {})],
        lambda x: x * x.mean((2, 3), keepdim=True),
    ),
    "where": Case(
        [("Where", [np.arange(6) > 2, "x", np.float32(0.1)], {})], lambda x: torch.where(torch.arange(6) > 2, x, 0.1)
    ),
    "relu by where": Case([("Greater", ["x", np.float32(0)], {}), ("Where", ["y0", "x", np.float32(0)], {})], F.relu),
    "concat": Case(
        [("Mul", ["x", "c"], {}), ("Concat", ["x", "y0"], {"axis": 1})], lambda x: torch.cat([x, x * T["c"]], 1)
    ),
    "flatten": one("Flatten", axis=1, f=lambda x: x.flatten(1)),
    "resize nearest": one(
        "Resize",
        None,
        np.array([1, 1, 2, 3], np.float32),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        f=lambda x: F.interpolate(x, scale_factor=(2, 3)),
    ),
    "resize linear": one(
        "Resize",
        None,
        None,
        i64(COUNT, 4, 5, 9),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
        f=lambda x: F.interpolate(x, (5, 9), mode="bilinear"),
    ),
    "older reduce": one("ReduceMean", axes=[2, 3], keepdims=1, opset=13, f=lambda x: x.mean((2, 3), keepdim=True)),
    "older split of the loss": one("Tanh", opset=13, f=torch.tanh),
}
