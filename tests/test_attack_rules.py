"""Every operator's gradient against torch, and smooth ones against onnx-ad, an independent derivation."""

import numpy as np
import onnx
import pytest
import torch
from attack_rule_cases import CASES, COUNT, Case, Node, W, i64, one
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from mpdsgr_deploy.attack_graph import attack_graph
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.session import CPU, Session

SHAPE, CLASSES = (4, 7, 6), 3


def network(case: Case) -> onnx.ModelProto:
    """Images through the nodes of a case, then flattened into a linear layer."""
    x = torch.zeros(2, *SHAPE)
    size = case.torch(x).flatten(1).shape[1]
    initializers = {**W, "head": head(size)}
    nodes = []
    for number, (op, inputs, attrs) in enumerate(case.nodes):
        names = []
        for position, value in enumerate(inputs):
            if isinstance(value, str):
                names.append(value)
            elif value is None:
                names.append("")
            else:
                array = np.asarray(value)
                if op == "Resize" and array.dtype == np.int64:
                    array = np.array([COUNT, *array[1:]], np.int64)
                names.append(f"k{number}_{position}")
                initializers[names[-1]] = array
        further = [f"y{number}_{i}" for i in range(1, attrs.get("outputs", 1))]
        own = {name: value for name, value in attrs.items() if name != "outputs"}
        nodes.append(helper.make_node(op, names, [f"y{number}", *further], **own))
    nodes.append(helper.make_node("Flatten", [f"y{len(case.nodes) - 1}"], ["flat"], axis=1))
    nodes.append(helper.make_node("Gemm", ["flat", "head"], ["logits"]))
    used = {name for node in nodes for name in node.input}
    batch = COUNT if any(op == "Resize" for op, _, _ in case.nodes) else "batch"  # its sizes name the batch too
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10)


def head(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal(0, 1, (size, CLASSES)).astype(np.float32)


def gradient(
    model: onnx.ModelProto, x: np.ndarray, y: np.ndarray, surrogate: str = "triangle", width: float = 1
) -> np.ndarray:
    graph = attack_graph(model, surrogate)
    onnx.checker.check_model(graph, full_check=True)
    session = Session(graph, CPU, source="the test")
    scalars = {"width": np.array(1, np.float32), "loss": np.array(0, np.float32)}
    return session({model.graph.input[0].name: x, "classes": y, **scalars}, ["gradient"])[0]


def images() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    return draw.normal(0, 1, (COUNT, *SHAPE)).astype(np.float32), draw.integers(0, CLASSES, COUNT)


def by_torch(case: Case, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The gradient of the cross-entropy by autograd."""
    tensor = torch.from_numpy(x).requires_grad_()
    features = case.torch(tensor).flatten(1)
    logits = features @ torch.from_numpy(head(features.shape[1]))
    F.cross_entropy(logits, torch.from_numpy(y), reduction="sum").backward()
    return tensor.grad.numpy()


@pytest.mark.parametrize("name", CASES)
def test_an_operators_gradient_is_torchs(name: str) -> None:
    case, (x, y) = CASES[name], images()
    tensor = torch.from_numpy(x).requires_grad_()
    features = case.torch(tensor).flatten(1)
    F.cross_entropy(
        features @ torch.from_numpy(head(features.shape[1])), torch.from_numpy(y), reduction="sum"
    ).backward()
    expected = tensor.grad.numpy()
    found = gradient(network(case), x, y)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_sizes_that_a_network_computes_are_inferred() -> None:
    """Older exporters compute the target of every Reshape from the batch's own size, which leaves sizes unknown."""
    nodes: list[Node] = [
        ("Shape", ["x"], {"start": 0, "end": 1}),
        ("Concat", ["y0", i64(8), i64(21)], {"axis": 0}),
        ("Reshape", ["x", "y1"], {}),
        ("ReduceMean", ["y2", i64(1, 2)], {"keepdims": 0}),
    ]
    case, (x, y) = Case(nodes, lambda x: x.reshape(-1, 8, 21).mean((1, 2))[:, None]), images()
    model = network(case)
    del model.graph.node[-2:]
    model.graph.node.extend(
        [
            helper.make_node("Unsqueeze", ["y3", "last"], ["flat"]),
            helper.make_node("Gemm", ["flat", "head"], ["logits"]),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(i64(1), "last"))
    expected = by_torch(case, x, y)
    np.testing.assert_allclose(gradient(model, x, y), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("op", ["MaxPool", "ReduceMax"])
def test_ties_go_to_the_first_as_in_torch(op: str) -> None:
    """Spikes tie everywhere: sharing would be another gradient."""
    if op == "MaxPool":
        case = one(op, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], f=lambda x: F.max_pool2d(x, 3, 2, 1))
    else:
        case = one(op, i64(3), keepdims=0, f=lambda x: x.max(3).values)
    x, y = images()
    x = (x > 0).astype(np.float32)
    tensor = torch.from_numpy(x).requires_grad_()
    features = case.torch(tensor).flatten(1)
    F.cross_entropy(
        features @ torch.from_numpy(head(features.shape[1])), torch.from_numpy(y), reduction="sum"
    ).backward()
    np.testing.assert_allclose(gradient(network(case), x, y), tensor.grad, atol=1e-5)


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(InputError, match=r"node y0 \(Cos\) is an operator without a rule"):
        attack_graph(network(one("Cos", f=torch.cos)), "triangle")


def reversed_by_another(model: onnx.ModelProto, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The gradient of the cross-entropy by onnx-ad, from the gradient in the logits that softmax gives."""
    onnx_ad = pytest.importorskip("onnx_ad")
    for entry in (model.graph.input[0], model.graph.output[0]):
        entry.type.tensor_type.shape.dim[0].dim_value = len(x)
    logits = Session(model, CPU, source="the test")({"x": x}, ["logits"])[0]
    seed = torch.from_numpy(logits).softmax(1).numpy()
    seed[np.arange(len(y)), y] -= 1
    adjoint = onnx_ad.reverse(model, inputs=["x"], outputs=["logits"], layout="onnx")
    session = Session(adjoint, CPU, source="onnx-ad")
    return session({"x": x, "adj_logits": seed[..., None]}, ["adj_x"])[0][..., 0]


# What onnx-ad 0.3 refuses: automatic and reflecting padding, slices in steps
REFUSED = {"conv same", "pad by reflection", "slice in steps"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_an_independent_derivation_agrees(name: str) -> None:
    x, y = images()
    expected = reversed_by_another(network(CASES[name]), x, y)
    found = gradient(network(CASES[name]), x, y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_an_independent_derivation_passes_nothing_through_spikes_and_rounding() -> None:
    """Which is true, and no use to an attack: the reason why this package has a derivation of its own."""
    x, y = images()
    spiking = one("Greater", np.float32(0), f=F.relu)
    spiking.nodes.append(("Cast", ["y0"], {"to": TensorProto.FLOAT}))
    rounding = one("QuantizeLinear", np.float32(0.05), np.uint8(128), f=F.relu)
    rounding.nodes.append(("DequantizeLinear", ["y0", np.float32(0.05), np.uint8(128)], {}))
    for case in (spiking, rounding):
        assert gradient(network(case), x, y).any()
        assert not reversed_by_another(network(case), x, y).any()


def test_saturation_of_a_quantiser_is_a_clip() -> None:
    """Quantisers leave Relu out where the range begins at 0."""
    case = one("QuantizeLinear", np.float32(0.004), np.uint8(0), f=lambda x: x.clamp(0, 255 * 0.004))
    case.nodes.append(("DequantizeLinear", ["y0", np.float32(0.004), np.uint8(0)], {}))
    x, y = images()
    found, expected = gradient(network(case), x, y), by_torch(case, x, y)
    assert ((found != 0) == (expected != 0)).all()
    assert (found * expected).sum() / np.sqrt((found**2).sum() * (expected**2).sum()) > 0.999
