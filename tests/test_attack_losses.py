"""The losses that attack graphs end in, and their gradients in the logits."""

import numpy as np
import onnx
import pytest
import torch
from attack_networks import Run
from torch.nn import functional as F

from mpdsgr_deploy.attack_graph import attack_graph
from mpdsgr_deploy.errors import InputError


def logits_network(count: int, extra: str = "Identity") -> onnx.ModelProto:
    """Images [batch, 1, 1, K] that are their own logits, through one more operator."""
    text = f"""<ir_version: 10, opset_import: ["": 21]> own (float[batch, 1, 1, {count}] images)
        => (float[batch, {count}] logits) <int64[2] shape = {{-1, {count}}}> {{
            {"" if extra == "Identity" else f"changed = {extra} (images)"}
            logits = Reshape ({"images" if extra == "Identity" else "changed"}, shape)
        }}"""
    return onnx.parser.parse_model(text)


def dlr(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By its definition, one image at a time."""
    found = []
    for row, k in zip(z, y.tolist(), strict=True):
        wrong = torch.cat([row[:k], row[k + 1 :]])
        ordered = row.sort(descending=True).values
        gap = row[k] - wrong.max() if len(wrong) else 0 * row[k]
        found.append(-gap / (ordered[0] - ordered[2] + 1e-12) if len(row) > 2 else -gap)
    return torch.stack(found)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_both_losses_and_their_mixture_have_autograds_gradient(count: int) -> None:
    run = Run(logits_network(count), "triangle")
    draw = np.random.default_rng(1)
    x = draw.normal(0, 2, (64, 1, 1, count)).astype(np.float32)
    y = draw.integers(0, count, 64)
    z, classes = torch.from_numpy(x[:, 0, 0]).double().requires_grad_(), torch.from_numpy(y)
    ce, ratio = F.cross_entropy(z, classes, reduction="none"), dlr(z, classes)
    for loss in (0.0, 1.0, 0.25):
        found = run(x, y, loss)
        np.testing.assert_allclose(found["ce"], ce.detach(), atol=1e-5)
        np.testing.assert_allclose(found["dlr"], ratio.detach(), atol=1e-4, rtol=1e-5)
        (gradient,) = torch.autograd.grad(((1 - loss) * ce + loss * ratio).sum(), z, retain_graph=True)
        np.testing.assert_allclose(found["gradient"][:, 0, 0], gradient, rtol=2e-4, atol=1e-5)


def test_finite_differences_of_the_losses() -> None:
    run = Run(logits_network(5), "triangle")
    draw = np.random.default_rng(2)
    x, y, h = draw.normal(0, 2, (16, 1, 1, 5)).astype(np.float32), draw.integers(0, 5, 16), 1e-2
    for loss, name in ((0.0, "ce"), (1.0, "dlr")):
        gradient = run(x, y, loss)["gradient"]
        for k in range(5):
            step = np.zeros_like(x)
            step[..., k] = h
            difference = (run(x + step, y)[name] - run(x - step, y)[name]) / (2 * h)
            close = np.abs(difference - gradient[:, 0, 0, k]) < 1e-2 * (1 + np.abs(difference))
            assert close.sum() >= 15  # a kink of DLR may lie between


def test_an_operator_without_a_rule_is_named() -> None:
    with pytest.raises(InputError, match=r"node changed \(Cos\) is an operator without a rule"):
        attack_graph(logits_network(3, "Cos"), "triangle")
