"""Spikes are found by pattern, and no comparison between images and logits is ever taken for a constant."""

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from mpdsgr_deploy.attack_graph import attack_graph
from mpdsgr_deploy.attack_graph.jumps import find_jumps
from mpdsgr_deploy.attack_graph.layers import group
from mpdsgr_deploy.attack_graph.tape import Tape
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.session import CPU, Session
from mpdsgr_deploy.snn.surrogate import make_surrogate, spike

WEIGHTS = np.random.default_rng(0).normal(0, 1, (4, 3)).astype(np.float32)


def network(body: str, inputs: str = "float[b, 4] x", constants: str = "") -> onnx.ModelProto:
    """Images x [b, 4] through `body`, which makes s [b, 4], to three logits."""
    weights = ", ".join(str(float(w)) for w in WEIGHTS.ravel())
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> own ({inputs}) => (float[b, 3] logits)
        <float[4, 3] head = {{{weights}}}, float zero = {{0}}, float half = {{0.5}}, float one = {{1}},
         float two = {{2}}, float tenth = {{0.1}}{constants}> {{
            {body}
            logits = MatMul (s, head)
        }}"""
    )


def gradient(model: onnx.ModelProto, x: np.ndarray, surrogate: str = "triangle", **noise: np.ndarray) -> np.ndarray:
    """Of the cross-entropy of class 0."""
    session = Session(attack_graph(model, surrogate), CPU, source="the test")
    y, scalars = np.zeros(len(x), np.int64), {"width": np.array(1, np.float32), "loss": np.array(0, np.float32)}
    return session({"x": x, "classes": y, **scalars, **noise}, ["gradient"])[0]


def through_torch(x: np.ndarray, spikes: object) -> np.ndarray:
    tensor = torch.from_numpy(x).requires_grad_()
    logits = spikes(tensor) @ torch.from_numpy(WEIGHTS)
    F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64), reduction="sum").backward()
    return tensor.grad.numpy()


def images(count: int = 9) -> np.ndarray:
    return np.random.default_rng(1).normal(0.4, 0.8, (count, 4)).astype(np.float32)


TRIANGLE = make_surrogate("triangle")


def fires(x: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    return spike(x, threshold, TRIANGLE)


PATTERNS = {
    "greater or equal": ("c = GreaterOrEqual (x, half) s = Cast <to = 1> (c)", fires),
    "greater": ("c = Greater (x, half) s = Cast <to = 1> (c)", fires),
    "less, swapped": ("c = Less (half, x) s = Cast <to = 1> (c)", fires),
    "less": ("c = LessOrEqual (x, half) s = Cast <to = 1> (c)", lambda x: 1 - fires(x)),
    "not": ("c = Less (x, half) d = Not (c) s = Cast <to = 1> (d)", fires),
    "of a difference": ("v = Sub (x, half) c = Greater (v, zero) s = Cast <to = 1> (c)", fires),
    "by whole numbers": ("c = Greater (x, half) i = Cast <to = 7> (c) s = Cast <to = 1> (i)", fires),
    "compared again": ("c = Greater (x, half) f = Cast <to = 1> (c) d = Less (half, f) s = Cast <to = 1> (d)", fires),
    "and cast back": ("c = Greater (x, half) f = Cast <to = 1> (c) d = Cast <to = 9> (f) s = Cast <to = 1> (d)", fires),
    "where": ("c = Greater (x, half) s = Where (c, two, tenth)", lambda x: 0.1 + 1.9 * fires(x)),
    "sign": ("v = Sub (x, half) s = Sign (v)", lambda x: 2 * fires(x) - 1),
    "heaviside of sign": ("v = Sub (x, half) g = Sign (v) a = Add (g, one) s = Mul (a, half)", fires),
    "relu of sign": ("v = Sub (x, half) g = Sign (v) s = Relu (g)", fires),
    "learned threshold": ("t = Mul (x, tenth) c = Less (t, x) s = Cast <to = 1> (c)", lambda x: fires(0.9 * x, 0.0)),
    "selection": (
        "c = Greater (x, half) a = Mul (x, two) s = Where (c, a, one)",
        lambda x: torch.where(x > 0.5, 2 * x, 1.0) + (fires(x) - fires(x).detach()) * (2 * x - 1).detach(),
    ),
    "clipping by where": ("c = Greater (x, half) s = Where (c, half, x)", lambda x: x.clamp(max=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_spikes_are_recognised(name: str) -> None:
    body, by_torch = PATTERNS[name]
    x = images()
    np.testing.assert_allclose(gradient(network(body), x), through_torch(x, by_torch), atol=1e-6)


OVERLOOKED = {
    "both": ("c = Greater (x, half) d = Less (x, two) e = And (c, d) s = Cast <to = 1> (e)", r"e \(And\) compares"),
    "equal": ("c = Equal (x, half) s = Cast <to = 1> (c)", r"c \(Equal\) compares values"),
    "multi-spike": ("v = Div (x, half) s = Floor (v)", r"s \(Floor\) rounds.*at most one spike per step"),
    "rounded": ("v = Round (x) s = Relu (v)", r"v \(Round\) rounds"),
    "truncated": ("i = Cast <to = 7> (x) s = Cast <to = 1> (i)", r"i \(Cast\) compares values"),
    "not zero": ("c = Cast <to = 9> (x) s = Cast <to = 1> (c)", r"c \(Cast\) compares values"),
    "chosen place": ("i = ArgMax <axis = 1> (x) a = Cast <to = 1> (i) s = Add (x, a)", r"i \(ArgMax\) compares values"),
    "clipped sign": ("v = Sign (x) s = Clip (v, zero, one)", r"s \(Clip\) compares values"),
    "loop that reads images in its body": (
        "n = Cast <to = 7> (two) go = Cast <to = 9> (one) l = Loop (n, go, zero) "
        "<body = step (int64 i, bool c, float u) => (bool d, float[b, 4] v) { d = Identity (c) v = Add (u, x) }> "
        "s = Add (x, l)", r"l \(Loop\) is control flow: unroll"),
    "branch": ("c = Greater (x, half) n = ReduceMax <keepdims = 0> (x) t = Greater (n, half) "
             "s = If (t) <then_branch = a () => (float[b, 4] p) { p = Identity (x) }, "
             "else_branch = e () => (float[b, 4] q) { q = Neg (x) }>", r"s \(If\) is control flow: unroll"),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLOOKED)
def test_what_no_surrogate_stands_for_is_an_error(name: str) -> None:
    body, message = OVERLOOKED[name]
    with pytest.raises(InputError, match=message):
        attack_graph(network(body), "triangle")


def test_only_declared_noise_passes_the_gradient_straight_through() -> None:
    """An unnamed comparison of another library is a spike; taken for Poisson encoding, it would look robust."""
    x = images()
    encoded = network("c = GreaterOrEqual (x, n) s = Cast <to = 1> (c)", "float[b, 4] x, float[b, 4] n")
    noise = np.random.default_rng(2).random((9, 4), np.float32)
    assert gradient(encoded, x, n=noise).all()
    constant = network("c = GreaterOrEqual (x, half) s = Cast <to = 1> (c)")
    assert not gradient(constant, x)[np.abs(x - 0.5) > 1].any()


def test_a_comparison_that_reaches_no_logit_does_not_matter() -> None:
    attack_graph(network("c = Equal (x, half) s = Relu (x)"), "triangle")


RECURRENT = """
    u0 = Mul (x, two)           c0 = GreaterOrEqual (u0, one)    s0 = Cast <to = 1> (c0)
    l0 = Sub (u0, s0)           h0 = Mul (l0, half)              u1 = Add (h0, x)
    c1 = GreaterOrEqual (u1, one)  s1 = Cast <to = 1> (c1)
    l1 = Sub (u1, s1)           h1 = Mul (l1, half)              u2 = Add (h1, x)
    c2 = GreaterOrEqual (u2, one)  s2 = Cast <to = 1> (c2)
    a = MatMul (s2, square)     d = Greater (a, one)             e = Cast <to = 1> (d)
    b = Add (s0, s1)            s = Add (b, e)"""
SQUARE = ", float[4, 4] square = {" + ", ".join(["0.3"] * 16) + "}"


def recurrent(x: torch.Tensor, *, detached: bool) -> torch.Tensor:
    u, spikes = torch.zeros_like(x), []
    for t in range(3):
        u = u * 0.5 + (2 * x if t == 0 else x)
        spikes.append(fires(u, 1.0))
        u = u - (spikes[-1].detach() if detached else spikes[-1])
    return spikes[0] + spikes[1] + fires(spikes[2] @ torch.full((4, 4), 0.3), 1.0)


def test_layers_and_time_steps_are_those_who_reset_whom() -> None:
    tape = Tape(network(RECURRENT, constants=SQUARE), "x")
    layers = group(tape, find_jumps(tape))
    assert [len(steps) for steps in layers.steps.values()] == [3, 1]
    assert layers.resets == {("l0", "s0"), ("l1", "s1")}


def test_a_second_comparison_of_one_potential_is_the_same_spike() -> None:
    """snnTorch compares again to reset, and exporters store each comparison's threshold as a constant of its own."""
    reset = "r0 = GreaterOrEqual (u0, other) q0 = Cast <to = 1> (r0) l0 = Sub (u0, q0)"
    again = RECURRENT.replace("l0 = Sub (u0, s0)", reset)
    tape = Tape(network(again, constants=SQUARE + ", float other = {1}"), "x")
    layers = group(tape, find_jumps(tape))
    assert [len(steps) for steps in layers.steps.values()] == [3, 1]
    assert layers.resets == {("l0", "q0"), ("l1", "s1")}


@pytest.mark.parametrize("detached", [False, True])
def test_a_reset_passes_a_gradient_unless_it_is_detached(detached: bool) -> None:
    x = images()
    found = gradient(network(RECURRENT, constants=SQUARE), x, "triangle+detached" if detached else "triangle")
    np.testing.assert_allclose(found, through_torch(x, lambda x: recurrent(x, detached=detached)), atol=1e-5)
    other = through_torch(x, lambda x: recurrent(x, detached=not detached))
    assert np.abs(found - other).max() > 1e-3
