from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.export.fold import fold_tdbn
from mpdsgr_deploy.export.onnx_writer import write_onnx
from mpdsgr_deploy.models import MODELS, build_model
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.snn import Trace


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64)])
def test_every_model_maps_images_to_logits(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(recipe(model={"name": name, "width": 0.05}), shape, 7).eval()
    traces: list[Trace] = []
    logits = model(torch.rand(2, *shape), traces.append)
    assert logits.shape == (2, 7)
    assert len({t.layer for t in traces}) == len(traces) > 2


def test_small_vgg_takes_8x8_and_its_width_is_a_field() -> None:
    sizes = []
    for width in (0.5, 1.0):
        model = build_model(recipe(model={"name": "vgg-small", "width": width}), (1, 8, 8), 10)
        assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert 3 < sizes[1] / sizes[0] < 4


def test_logits_are_the_time_mean_of_the_readout() -> None:
    model = build_model(recipe(model={"name": "vgg-small", "width": 0.1}), (1, 8, 8), 3).eval()
    seen: list[torch.Tensor] = []
    model.readout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(torch.rand(4, 1, 8, 8))
    torch.testing.assert_close(logits, seen[0].unflatten(0, (2, 4)).mean(0))


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_membrane_readout_is_a_leaky_integrator_also_exported(tau: float, tmp_path: Path) -> None:
    """m_t = tau m_{t-1} + y_t without threshold; the logits are m_T."""
    torch.manual_seed(0)
    sections = {"model": {"name": "vgg-small", "width": 0.25, "readout": "membrane"}, "neuron": {"tau": tau}}
    model = build_model(recipe(**sections, encoding={"T": 5}), (1, 8, 8), 3).eval()
    seen: list[torch.Tensor] = []
    hook = model.readout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.rand(4, 1, 8, 8)
    logits = model(x).detach()
    hook.remove()
    potential = torch.zeros(4, 3)
    for y in seen[0].detach().unflatten(0, (5, 4)):
        potential = tau * potential + y
    torch.testing.assert_close(logits, potential, rtol=1e-5, atol=1e-6)
    write_onnx(fold_tdbn(model), (1, 8, 8), tmp_path / "model.onnx")
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
        build_model(recipe(model={"name": "vgg12"}), (3, 32, 32), 10)
    with pytest.raises(InputError, match="triangle"):
        build_model(recipe(neuron={"surrogate": "arctan"}), (3, 32, 32), 10)
    with pytest.raises(InputError, match="halves"):
        build_model(recipe(), (3, 4, 4), 10)
