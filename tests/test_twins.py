"""Formulas that are written twice, for torch, ONNX or NumPy, held together where they are most likely to part.

Surrogates in torch, ONNX and the GPU kernels: test_surrogate. Encodings and noise in torch and ONNX: test_encodings and
test_stochastic_export. Attack graphs against torch's gradients: test_attack_graph.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from mpdsgr_deploy.attack_graph.derive import losses
from mpdsgr_deploy.attack_graph.tape import Tape
from mpdsgr_deploy.attacks.square import _judge
from mpdsgr_deploy.attacks.torch_target import cross_entropy, dlr, margin
from mpdsgr_deploy.data.batches import to_unit as torch_unit
from mpdsgr_deploy.data.images import Images, to_unit
from mpdsgr_deploy.data.likeness import Likeness, PixelStatistics
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.prediction.writers import best
from mpdsgr_deploy.serving.tensors import best as served_best
from mpdsgr_deploy.serving.tensors import margin as served_margin

CLASSES = (1, 2, 3, 4, 10)


def onnx_losses(z: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Cross-entropy [B], its gradient [B, K], DLR [B] and its gradient, by the nodes of an attack graph."""
    count = z.shape[1]
    inputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", count]),
        helper.make_tensor_value_info("y", TensorProto.INT64, ["batch"]),
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["z"], ["logits"])], "losses", inputs, [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    tape = Tape(model, "z")
    names = losses(tape, "logits", "y", count)
    tape.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(tape.network.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(names), {"z": z, "y": y})


@pytest.mark.parametrize("count", CLASSES)
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_losses_in_torch_and_onnx(count: int, batch: int) -> None:
    draw = np.random.default_rng(10 * count + batch)
    z = draw.normal(0, 3, (batch, count)).astype(np.float32)
    z[0] *= 20  # a share that underflows
    y = draw.integers(0, count, batch)
    found = onnx_losses(z, y)
    for loss, value, gradient in ((cross_entropy, *found[:2]), (dlr, *found[2:])):
        logits = torch.from_numpy(z).requires_grad_()
        expected = loss(logits, torch.from_numpy(y))
        (slope,) = torch.autograd.grad(expected.sum(), logits)
        np.testing.assert_allclose(value, expected.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("count", CLASSES)
def test_losses_of_equal_logits_are_finite_and_alike(count: int) -> None:
    z, y = np.full((2, count), 1.5, np.float32), np.array([0, count - 1])
    found = onnx_losses(z, y)
    np.testing.assert_allclose(found[0], cross_entropy(torch.from_numpy(z), torch.from_numpy(y)), rtol=1e-6)
    np.testing.assert_allclose(found[2], dlr(torch.from_numpy(z), torch.from_numpy(y)), atol=1e-6)
    assert all(np.isfinite(array).all() for array in found)


@pytest.mark.parametrize("count", CLASSES)
def test_margins_in_torch_square_and_the_server(count: int) -> None:
    """The attacks' margin is that of the true class; the server's, of the best one, is the same where it is right."""
    z = np.random.default_rng(count).normal(size=(20, count)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, count, 20)
    found, right = _judge(z, y)
    np.testing.assert_array_equal(found, -margin(torch.from_numpy(z), torch.from_numpy(y)).numpy())
    np.testing.assert_array_equal(served_margin(z)[right], found[right])
    assert (found[right] >= 0).all()
    assert served_margin(z[:0]).shape == (0,)


@pytest.mark.parametrize("count", CLASSES)
def test_the_best_labels_of_files_and_server_with_ties(count: int) -> None:
    z = np.random.default_rng(count).integers(0, 3, (30, count)).astype(np.float32)
    labels = [f"name {k}" for k in range(count)]
    for top in {1, count}:
        classes, shares = best(z, top)
        served = [[int(text.split(":")[1]) for text in row] for row in served_best(z, labels, top)]
        assert classes.tolist() == served
        expected = torch.softmax(torch.from_numpy(z), 1).numpy()
        np.testing.assert_allclose(shares, np.take_along_axis(expected, classes, 1), rtol=1e-5)


def test_pixels_in_numpy_and_torch() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_unit(levels), torch_unit(torch.from_numpy(levels)).numpy())


@pytest.mark.parametrize("images", [1, 7])
def test_mean_and_spread_of_training_images_and_of_a_warning(images: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 2, 6, 6), np.uint8)
    mean, std = Images(pixels, np.zeros(images, np.int64), ("a",)).statistics()
    counted = Likeness(PixelStatistics(mean=tuple(mean), std=tuple(std))).add(pixels)
    np.testing.assert_allclose(counted._sum / counted._pixels, mean, rtol=1e-9)
    spread = np.sqrt(counted._squares / counted._pixels - (counted._sum / counted._pixels) ** 2)
    np.testing.assert_allclose(spread, std, rtol=1e-9)
    assert counted.warning() is None


def test_parity_of_no_rows_and_of_one_class() -> None:
    empty = compare(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))
    assert (empty.rows, empty.holds) == (0, False)
    one = compare(np.ones((4, 1), np.float32), np.ones((4, 1), np.float32))
    assert one.holds
    assert not compare(np.ones((4, 1), np.float32), np.full((4, 1), np.nan, np.float32)).holds
