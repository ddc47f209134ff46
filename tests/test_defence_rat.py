"""RAT's retraction: the formula, where it leads, which rows it moves."""

import pytest
import torch
from conftest import small_recipe
from torch import nn

from mpdsgr_deploy.defences import build_defended, make_defences
from mpdsgr_deploy.defences.rat import Retraction, RetractionSettings, retracted
from mpdsgr_deploy.errors import InputError


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_one_step_is_the_formula(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(w)
    for i in range(shape[0]):
        for j in range(shape[1]):
            cubed = sum(w[i, k] * w[m, k] * w[m, j] for k in range(shape[1]) for m in range(shape[0]))
            expected[i, j] = 1.1 * w[i, j] - 0.1 * cubed
    torch.testing.assert_close(retracted(w, 0.1), expected)


def test_many_steps_make_the_rows_orthonormal() -> None:
    w = 0.3 * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    identity = torch.eye(4, dtype=torch.float64)
    distances = []
    for _ in range(500):
        distances.append((w @ w.T - identity).norm().item())
        w = retracted(w, 0.02)
    assert distances == sorted(distances, reverse=True)
    torch.testing.assert_close(w @ w.T, identity, rtol=0, atol=1e-6)


class Simplex(nn.Module):
    """Stands for a convex combination."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, 0.8]))

    def project(self) -> None:
        self.weight.copy_(torch.tensor([0.5, 0.5]))


def test_every_convolution_and_linear_layer_moves_a_large_one_by_exactly_30_percent_of_its_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(12, 199), nn.Linear(12, 210), nn.BatchNorm2d(3), Simplex())
    model = model.to(memory_format=torch.channels_last)  # as in training
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    defence = Retraction(RetractionSettings(b=0.1))
    defence.after_step(model, torch.Generator().manual_seed(0))
    conv = before["0.weight"].reshape(3, -1)
    torch.testing.assert_close(model[0].weight.reshape(3, -1), 1.1 * conv - 0.1 * conv @ conv.T @ conv)
    small = before["1.weight"]
    torch.testing.assert_close(model[1].weight, 1.1 * small - 0.1 * small @ small.T @ small)
    moved = (model[2].weight != before["2.weight"]).any(1)
    assert moved.sum() == 63
    rows = before["2.weight"][moved]
    torch.testing.assert_close(model[2].weight[moved], 1.1 * rows - 0.1 * rows @ rows.T @ rows)
    assert model[4].weight.tolist() == [0.5, 0.5]
    for untouched in ("0.bias", "1.bias", "2.bias", "3.weight", "3.bias"):
        assert torch.equal(model.get_parameter(untouched), before[untouched])

    earlier = model[2].weight.detach().clone()
    defence.after_step(model, torch.Generator().manual_seed(1))
    assert not torch.equal((model[2].weight != earlier).any(1), moved)


def test_a_whole_model_is_retracted() -> None:
    model, (defence,) = build_defended(small_recipe(defence={"rat": {}}, training={"weight_decay": 0.0}), (1, 8, 8), 10)
    before = [layer.synapse.weight.detach().clone() for layer in model.layers()]
    defence.after_step(model, torch.Generator())
    assert all(not torch.equal(layer.synapse.weight, w) for layer, w in zip(model.layers(), before, strict=True))


def test_weight_decay_must_be_off() -> None:
    with pytest.raises(InputError, match=r"training\.weight_decay is 0\.0005; set training\.weight_decay = 0$"):
        make_defences(small_recipe(defence={"rat": {}}))
