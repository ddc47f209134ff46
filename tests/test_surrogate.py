"""Surrogates: each kind's derivative, its ONNX nodes and its line of the GPU kernels say the same."""

import ast
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from scipy.integrate import quad

from mpdsgr_deploy.attack_graph import attack_graph
from mpdsgr_deploy.attack_graph.tape import Tape
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.registry import Registry
from mpdsgr_deploy.snn.surrogate import make_surrogate, spike
from mpdsgr_deploy.surrogates import ATTACK_ONLY, KINDS, Nodes, SurrogateKind, parse_surrogate, scaled, surrogate_nodes


def primitive(name: str, v: float) -> float:
    """Closed form of the surrogate's integral from -inf (or the support's edge) to v, at default parameters."""
    if name == "triangle":
        v = min(max(v, -1), 1)
        return (1 + v) ** 2 / 2 if v < 0 else 1 - (1 - v) ** 2 / 2
    if name == "rectangular":
        return min(max(v + 0.5, 0), 1)
    if name == "sigmoid":
        return 1 / (1 + math.exp(-4 * v))
    if name == "arctan":  # a = 2
        return math.atan(math.pi * v) / math.pi + 0.5
    if name == "exponential":  # a = 0.5
        return math.exp(2 * v) / 2 if v < 0 else 1 - math.exp(-2 * v) / 2
    if name == "superspike":  # k = 10: total mass 2 / k
        half = 1 / (10 * (1 + 10 * abs(v)))
        return half if v < 0 else 2 / 10 - half
    raise NotImplementedError(f"write the integral of {name} here")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("v", [-2.0, -0.7, -0.3, -0.01, 0.2, 0.45, 0.9, 3.0])
def test_derivative_matches_the_numeric_one(name: str, v: float) -> None:
    step = 1e-6
    numeric = (primitive(name, v + step) - primitive(name, v - step)) / (2 * step)
    found = make_surrogate(name).derivative(torch.tensor(v, dtype=torch.float64)).item()
    assert found == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parameter", [0.5, 2.0])
def test_half_width_holds_the_claimed_mass(name: str, parameter: float) -> None:
    surrogate = make_surrogate(name, parameter)

    def slope(v: float) -> float:
        return surrogate.derivative(torch.tensor(v, dtype=torch.float64)).item()

    def mass(bound: float) -> float:
        edges = sorted({0.0, min(surrogate.half_width, bound), min(10.0, bound), bound})
        return sum(quad(slope, a, b, limit=500)[0] for a, b in pairwise(edges))

    finite = name in ("triangle", "rectangular")
    assert mass(surrogate.half_width) / mass(2e3) == pytest.approx(1.0 if finite else 0.95, rel=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_spike_is_the_step_forward_and_the_surrogate_backward(name: str) -> None:
    surrogate = make_surrogate(name)
    u = torch.tensor([-1.0, 0.4, 0.999, 1.0, 1.3, 5.0], requires_grad=True)
    spikes = spike(u, 1.0, surrogate)
    assert spikes.tolist() == [0, 0, 0, 1, 1, 1]
    (3 * spikes.sum()).backward()
    assert torch.equal(u.grad, 3 * surrogate.derivative(u.detach() - 1.0))
    with torch.no_grad():
        assert torch.equal(spike(u, 1.0, surrogate), spikes)


def through_nodes(name: str, v: np.ndarray) -> np.ndarray:
    """The derivative by the ONNX nodes of a surrogate, at v [n]."""
    kind, width, *_ = parse_surrogate(name)
    value = onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, ["n"])
    scalar = onnx.helper.make_tensor_value_info("width", onnx.TensorProto.FLOAT, [])
    empty = onnx.helper.make_graph([], "surrogate", [value, scalar], [])
    opsets = [onnx.helper.make_opsetid("", 21)]
    tape = Tape(onnx.helper.make_model(empty, opset_imports=opsets, ir_version=10), "v")
    slope = surrogate_nodes(kind)(Nodes(tape), "v")
    tape.graph.output.append(onnx.helper.make_tensor_value_info(slope, onnx.TensorProto.FLOAT, ["n"]))
    reference = ReferenceEvaluator(tape.network)
    return reference.run(None, {"v": v, "width": np.array(width, np.float32)})[0]


def kernel_lines() -> dict[str, str]:
    """What `_derivative` of the GPU kernels returns for each kind, read from its source: no GPU, no Triton."""
    source = Path(KINDS["triangle"].derivative.__code__.co_filename).parent / "snn" / "triton_kernels.py"
    tree = ast.parse(source.read_text())
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_derivative")
    lines, (branch,) = {}, [node for node in function.body if isinstance(node, ast.If)]
    while isinstance(branch, ast.If):
        (answer,) = branch.body
        lines[ast.literal_eval(branch.test.comparators[0])] = ast.unparse(answer.value)
        branch = branch.orelse[0] if branch.orelse else None
    return lines


class FakeTriton:
    """The functions of `triton.language` that the kernels' derivatives use, on numpy."""

    abs, maximum, where, exp = np.abs, np.maximum, np.where, np.exp

    @staticmethod
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("width", ["", ":0.5", ":3"])
@pytest.mark.parametrize("name", KINDS)
def test_numpy_torch_onnx_and_the_kernels_agree(name: str, width: str) -> None:
    kind, w, *_ = parse_surrogate(name + width)
    v = np.linspace(-3, 3, 401, dtype=np.float32)
    v = v[np.abs(np.abs(v) - w / 2) > 1e-4]  # the rectangular one jumps there
    expected = KINDS[kind].derivative(v.astype(np.float64), w)
    assert KINDS[kind].derivative(v, w).dtype == np.float32
    np.testing.assert_allclose(make_surrogate(name + width).derivative(torch.from_numpy(v)), expected, atol=2e-6 * w)
    np.testing.assert_allclose(through_nodes(name + width, v), expected, rtol=1e-5, atol=2e-6)
    if KINDS[kind].kernel is None:
        return
    line = kernel_lines()[kind]
    assert line == ast.unparse(ast.parse(KINDS[kind].kernel))
    scope = {"tl": FakeTriton, "v": v.astype(np.float64), "parameter": w, "HALF_PI": math.pi / 2}
    np.testing.assert_allclose(eval(line, scope), expected, rtol=1e-12, atol=1e-15)


def test_the_gpu_kernels_name_the_kinds_they_know() -> None:
    kernels = pytest.importorskip("mpdsgr_deploy.snn.triton_kernels")
    assert kernels.KINDS == kernel_lines().keys() == {name for name, kind in KINDS.items() if kind.kernel}
    assert kernels.HALF_PI.value == math.pi / 2


@pytest.mark.parametrize("name", KINDS)
def test_scaling_a_surrogate_scales_its_window(name: str) -> None:
    narrow = make_surrogate(scaled(name, 0.25))
    assert narrow.half_width == pytest.approx(make_surrogate(name).half_width / 4)


def test_a_kind_without_nodes_trains_and_is_refused_as_an_attack_form(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = SurrogateKind(derivative=lambda v, w: w * v**0, half_width=lambda w: 1 / w, width=2.0)
    monkeypatch.setitem(KINDS.loaded, "mine", mine)
    u = torch.tensor([0.0, 2.0], requires_grad=True)
    spike(u, 1.0, make_surrogate("mine:3")).sum().backward()
    assert u.grad.tolist() == [3, 3]
    assert make_surrogate("mine").expected is None
    network = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]> own (float[b, 3] images) => (float[b, 3] logits) {
            logits = Identity (images)
        }"""
    )
    with pytest.raises(InputError, match="surrogate 'mine' has no ONNX nodes"):
        attack_graph(network, "mine")


def test_an_attackers_kinds_are_no_derivatives_of_the_potential() -> None:
    assert isinstance(KINDS, Registry)
    assert not set(ATTACK_ONLY) & set(KINDS)
    assert make_surrogate("straight-through").derivative(torch.zeros(2)).tolist() == [1, 1]
    for name in ("rate", "adaptive"):
        with pytest.raises(InputError, match="unknown surrogate"):
            make_surrogate(name)
