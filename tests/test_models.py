from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.models import MODELS, SpikingNet, build_model
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.models.spiking_net import make_neuron
from mpdsgr_deploy.models.vgg import vgg11_slim
from mpdsgr_deploy.models.wrn import ConvexCombination, WideBlock
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.snn import LIF, TdBN, Trace, fold_time


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({"encoding": {"T": 2}, **sections})


def test_vgg11_is_the_published_layout() -> None:
    with torch.device("meta"):
        model = build_model(recipe(), (3, 32, 32), 10)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("synapse.weight")]
    widths = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    convolutions = [(out, into, 3, 3) for into, out in pairwise(widths)]
    assert shapes == [*convolutions, (4096, 8192), (4096, 4096)]
    assert [i for i, m in enumerate(model.body) if isinstance(m, torch.nn.AvgPool2d)] == [1, 4, 8]
    assert sum(p.numel() for p in model.parameters()) == 61_374_026


def test_vgg11_slim_has_as_many_parameters_as_it_states() -> None:
    with torch.device("meta"):
        model = build_model(recipe(model={"name": "vgg11-slim"}), (3, 32, 32), 10)
    count = sum(p.numel() for p in model.parameters())
    assert f"{count / 1e6:.1f} M parameters" in str(vgg11_slim.__doc__)


def test_vgg16_is_the_published_layout() -> None:
    """torchvision's VGG16 as the oracle for the convolutions and where they are pooled."""
    with torch.device("meta"):
        model = build_model(recipe(model={"name": "vgg16"}), (3, 64, 64), 200)
        published = torchvision.models.vgg16().features
    plan = [m.weight.shape if isinstance(m, torch.nn.Conv2d) else "P" for m in published if "ReLU" not in repr(m)]
    found = [m.synapse.weight.shape if hasattr(m, "synapse") else "P" for m in model.body[:18]]
    assert found == plan
    assert [tuple(m.synapse.weight.shape) for m in model.body[19:]] == [(4096, 2048), (4096, 4096)]
    assert tuple(model.readout.weight.shape) == (200, 4096)


def test_wrn16_4_is_the_published_layout() -> None:
    with torch.device("meta"):
        model = build_model(recipe(model={"name": "wrn16-4"}), (3, 32, 32), 10)
        traces: list[Trace] = []
        model(torch.rand(2, 3, 32, 32), traces.append)
    # 2,748,890 are those of the plain WRN-16-4; each of the 6 blocks adds the two weights of its convex combination
    assert sum(p.numel() for p in model.parameters()) == 2_748_890 + 12
    neurons = [tuple(t.states[0].u.shape[1:]) for t in traces]
    group1 = [(16, 32, 32), *[(64, 32, 32)] * 3]
    group2 = [(64, 32, 32), *[(128, 16, 16)] * 3]
    group3 = [(128, 16, 16), *[(256, 8, 8)] * 4]
    assert neurons == [*group1, *group2, *group3]
    assert len({t.layer for t in traces}) == 13


@pytest.mark.parametrize(("fan_out", "stride"), [(4, 1), (6, 1), (4, 2), (6, 2)])
def test_a_wide_block_is_a_convex_combination_of_shortcut_and_residual(fan_out: int, stride: int) -> None:
    config = recipe(neuron={"v_threshold": 0.8})
    block = WideBlock(config, "block", 4, fan_out, stride).eval()
    for norm in (block.first.norm, block.second.norm):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    block.combine.weight.data = torch.tensor([0.3, 0.7])
    x = torch.randn(2, 3, 4, 8, 8)

    def fire(norm: TdBN, x: torch.Tensor) -> torch.Tensor:
        """tdBN by its formula, then the neuron."""
        mean, deviation, lambda_, beta = (
            v[:, None, None] for v in (norm.running_mean, (norm.running_var + 1e-5).sqrt(), norm.weight, norm.bias)
        )
        return make_neuron(config)(lambda_ * 0.8 * (x - mean) / deviation + beta)[0]

    first = fire(block.first.norm, x)
    second = fire(block.second.norm, fold_time(block.second.synapse, first))
    shortcut = x if block.shortcut is None else fold_time(block.shortcut, first)
    assert (block.shortcut is None) == ((fan_out, stride) == (4, 1))
    torch.testing.assert_close(block(x), 0.3 * shortcut + 0.7 * fold_time(block.conv, second))


def test_wrn_hands_the_noise_to_every_neuron_and_averages_the_last_map() -> None:
    model = build_model(recipe(model={"name": "wrn16-4", "width": 0.1}), (3, 32, 32), 4).eval()
    seen: list[object] = []
    for module in model.modules():
        if isinstance(module, LIF):
            module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["noise"]), with_kwargs=True)
    traces: list[Trace] = []
    noise = torch.Generator()
    logits = model(torch.rand(2, 3, 32, 32), traces.append, noise)
    assert len(seen) == 13
    assert all(draw is noise for draw in seen)
    pooled = [torch.nn.functional.avg_pool2d(state.spikes, 8).flatten(1) for state in traces[-1].states]
    torch.testing.assert_close(logits, outputs(model, torch.stack(pooled)).mean(0))


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_without_tdbn_convolutions_have_the_bias_that_a_norm_would_make_useless(norm: str) -> None:
    model = build_model(recipe(model={"name": "wrn16-4", "width": 0.1, "norm": norm}), (3, 16, 16), 4)
    assert {m.bias is None for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {norm == "bn"}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == (13 if norm == "bn" else 0)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 4)


def test_the_convex_combination_is_projected_to_the_nearest_point_of_the_simplex() -> None:
    """Against the nearest of 10,001 points of the simplex, for weights on it, off it and beyond its ends."""
    combine = ConvexCombination().double()
    assert combine.weight.tolist() == [0.5, 0.5]
    ends = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    simplex = torch.stack([ends, 1 - ends], 1)
    draw = torch.Generator().manual_seed(0)
    for before in [*torch.randn(20, 2, generator=draw, dtype=torch.float64), simplex[2000]]:
        parameter = combine.weight
        parameter.data.copy_(before)
        combine.project()
        nearest = simplex[(simplex - before).square().sum(1).argmin()]
        assert combine.weight is parameter
        assert combine.weight.requires_grad
        torch.testing.assert_close(combine.weight.detach(), nearest, rtol=0, atol=1e-4)  # the grid's spacing
        assert combine.weight.min() >= 0
        assert combine.weight.sum() == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 36, 34), (3, 64, 64)])
def test_every_model_maps_images_to_logits(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(recipe(model={"name": name, "width": 0.05}), shape, 7).eval()
    traces: list[Trace] = []
    logits = model(torch.rand(2, *shape), traces.append)
    assert logits.shape == (2, 7)
    assert len({t.layer for t in traces}) == len(traces) > 0


def test_small_vgg_takes_8x8_and_its_width_is_a_field() -> None:
    sizes = []
    for width in (0.5, 1.0):
        model = build_model(recipe(model={"name": "vgg-small", "width": width}), (1, 8, 8), 10)
        assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert 3 < sizes[1] / sizes[0] < 4


def outputs(model: SpikingNet, steps: torch.Tensor) -> torch.Tensor:
    """What the last linear layer makes of every step by itself: [T, B, K]."""
    return torch.nn.functional.linear(steps, model.readout.weight, model.readout.bias)


def test_logits_are_the_time_mean_of_the_readout() -> None:
    model = build_model(recipe(model={"name": "vgg-small", "width": 0.1}), (1, 8, 8), 3).eval()
    seen: list[torch.Tensor] = []
    model.readout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = model(torch.rand(4, 1, 8, 8))
    torch.testing.assert_close(logits, outputs(model, seen[0]).mean(0))


def membrane_readout(tau: float) -> tuple[SpikingNet, torch.Tensor, torch.Tensor]:
    """A network, images [4, 1, 8, 8] and the potential m_3 [4, 3] by m_t = tau m_{t-1} + y_t, without threshold."""
    torch.manual_seed(0)
    sections = {"model": {"name": "vgg-small", "width": 0.25, "readout": "membrane"}, "neuron": {"tau": tau}}
    model = build_model(recipe(**sections, encoding={"T": 3}), (1, 8, 8), 3).eval()
    seen: list[torch.Tensor] = []
    hook = model.readout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(4, 1, 8, 8)
    model(x)
    hook.remove()
    potential = torch.zeros(4, 3)
    for y in outputs(model, seen[0]).detach():
        potential = tau * potential + y
    return model, x, potential


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_membrane_readout_is_a_leaky_integrator(tau: float) -> None:
    model, x, potential = membrane_readout(tau)
    torch.testing.assert_close(model(x).detach(), potential, rtol=1e-5, atol=1e-6)


def test_membrane_readout_is_a_leaky_integrator_when_exported(tmp_path: Path) -> None:
    model, x, potential = membrane_readout(0.5)
    save(to_graph(simplify(model), (1, 8, 8)), tmp_path / "model.onnx")
    with OnnxRuntime(tmp_path / "model.onnx") as artefact:
        assert artefact(x.numpy()) == pytest.approx(potential.numpy(), abs=1e-5)


def test_normalisation_is_inside() -> None:
    model = build_model(recipe(model={"name": "vgg-small", "width": 0.1}), (2, 8, 8), 3)
    model.normalize.set([0.1, 0.2], [0.5, 2.0])
    x = torch.rand(1, 2, 8, 8)
    found = model.normalize(x)
    torch.testing.assert_close(found[:, 0], (x[:, 0] - 0.1) / 0.5)
    torch.testing.assert_close(found[:, 1], (x[:, 1] - 0.2) / 2.0)


def test_bad_choices_name_the_allowed_ones() -> None:
    with pytest.raises(InputError, match="did you mean 'vgg11'"):
        build_model(recipe(model={"name": "vgg-11"}), (3, 32, 32), 10)
    with pytest.raises(InputError, match="triangle"):
        build_model(recipe(neuron={"surrogate": "arcsine"}), (3, 32, 32), 10)
    for name, side in (("vgg11", 4), ("vgg16", 28)):
        with pytest.raises(InputError, match="halves"):
            build_model(recipe(model={"name": name}), (3, side, side), 10)
