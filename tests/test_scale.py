"""Steps that take less memory or more processes are the same steps."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import T, small_recipe
from lightning_fabric import Fabric
from test_benchmarks import memory
from test_defences_each import AT, EACH, MPDSGR, SHAPE, recipe_with

from mpdsgr_deploy.data import Images, batches
from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.defences.base import neuron_shapes
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import LIF, Reader, SpikingLayer, Trace, recompute
from mpdsgr_deploy.snn.recompute import in_bytes, levels
from mpdsgr_deploy.snn.surrogate import make_surrogate
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.epoch import Learner, batch_loss

CASES: dict[str, Recipe] = {
    "plain": recipe_with({}),
    **{name: recipe_with({name: {}}) for name in EACH},
    "at": recipe_with(AT),
    "all": recipe_with({**AT, "rat": {}, "sr": {}, "stog": {}, **MPDSGR}),
    "dlif under attack": recipe_with({**AT, **MPDSGR, "dlif": {}}),
    "feel": recipe_with({**AT, **MPDSGR, "feel": {}}),
    "poisson": small_recipe(encoding={"name": "poisson"}, training={"batch_size": 16}),
    "wrn": small_recipe(model={"name": "wrn16-4", "width": 0.1}, training={"batch_size": 16}, defence=MPDSGR),
    "bn": small_recipe(model={"norm": "bn"}, training={"batch_size": 16}, defence=MPDSGR),
    "bf16": small_recipe(training={"batch_size": 16, "precision": "bf16-mixed"}, defence={"mpd-sgr": {}, "stog": {}}),
}


def learner_of(recipe: Recipe, *, again: bool = False) -> Learner:
    torch.manual_seed(0)
    model, defences = build_defended(recipe, SHAPE, 10)
    model.recompute = again
    fabric = Fabric(accelerator="cpu", devices=1, precision=recipe.training.precision)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return Learner(fabric, recipe, wrapped, model, defences, optimizer)


def stepped(learner: Learner) -> dict[str, torch.Tensor]:
    """All that one step measures, each gradient, and the running statistics it leaves."""
    pixels = torch.randint(256, (16, *SHAPE), dtype=torch.uint8, generator=generator(0, "pixels"))
    measured = batch_loss(learner, pixels, torch.arange(16) % 10, 0, generator(0, "draw"))
    learner.fabric.backward(measured["loss"])
    gradients = {f"gradient of {name}": p.grad for name, p in learner.model.named_parameters()}
    return {**measured, **gradients, **dict(learner.model.named_buffers())}


@pytest.mark.parametrize("recipe", CASES.values(), ids=CASES)
def test_layers_computed_again_give_the_same_step_to_the_bit(recipe: Recipe) -> None:
    kept, again = (stepped(learner_of(recipe, again=again)) for again in (False, True))
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("noise", ["generator", None, "draws"])
def test_noise_of_any_source_is_drawn_again(noise: str | None) -> None:
    x = torch.rand(4, *SHAPE)
    draws = [torch.rand(4, T, *shape) for shape in ((8, 8, 8), (16, 4, 4), (16, 4, 4))]
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model, _ = build_defended(small_recipe(defence={"stog": {}}), SHAPE, 10)
        model.recompute = again
        for layer in model.layers():
            layer.neuron.p.data.fill_(0.6)
        torch.manual_seed(5)
        source = {"generator": torch.Generator().manual_seed(3), "draws": draws, None: None}[noise]
        model(x, None, source).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        after = torch.rand(3)  # the global generator goes on where the forward pass left it
        gradients[-1].append(after)
    assert all(map(torch.equal, *gradients))


def seen(model: SpikingNet, observe: Any) -> None:
    model(torch.rand(2, *SHAPE), observe).sum().backward()


def test_observers_see_each_layer_once_and_traces_carry_the_same_gradient() -> None:
    model = build_model(small_recipe(), SHAPE, 10)
    expected = [layer.name for layer in model.layers()]
    found: dict[bool, list[torch.Tensor]] = {}
    for model.recompute in (False, True):
        traces: list[Trace] = []
        torch.manual_seed(1)
        seen(model, traces.append)
        assert [trace.layer for trace in traces] == expected
        model.zero_grad()
        model(torch.rand(2, *SHAPE), traces.append)
        torch.stack([trace.states[-1].u.square().sum() for trace in traces[3:]]).sum().backward()
        found[model.recompute] = [p.grad for p in list(model.parameters())[:-2]]
        model.zero_grad()
    assert all(map(torch.equal, *found.values()))
    names: list[str] = []
    seen(model, Reader(lambda trace: trace.layer, names.append))
    assert names == expected


@pytest.mark.parametrize("name", ["plain", *EACH])
def test_neurons_called_binary_are(name: str) -> None:
    """Their spikes are saved as bytes, and what is not 0 or 1 would be lost."""
    model, _ = build_defended(CASES[name], SHAPE, 10)
    for layer in model.layers():
        handed_on = layer.neuron(3 * torch.rand(T, 2, *layer_shape(layer, model)), noise=generator(0))[0]
        assert not layer.neuron.binary or set(handed_on.unique().tolist()) <= {0.0, 1.0}
        assert layer.neuron.binary is (name != "stog")


def layer_shape(layer: SpikingLayer, model: SpikingNet) -> tuple[int, ...]:
    return neuron_shapes(model, SHAPE)[layer.name]


@pytest.mark.parametrize("name", ["all", "dlif under attack", "feel", "wrn", "bf16"])
def test_spikes_saved_as_bytes_give_the_same_step_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_byte = stepped(learner_of(CASES[name]))
    monkeypatch.setattr(recompute, "levels", lambda module, received: None)
    as_they_are = stepped(learner_of(CASES[name]))
    assert all(torch.equal(value, as_they_are[what]) for what, value in in_byte.items())


@pytest.mark.parametrize("n", [1, 4, 16])
def test_multiples_of_a_fraction_survive_as_bytes(n: int) -> None:
    weight = torch.rand(5, 7, requires_grad=True)
    x = torch.randint(n + 1, (6, 7)) / n
    gradients = []
    for kept_as in (None, n):
        with in_bytes(x, kept_as):
            y = x @ weight.T
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_levels_follow_spikes_through_pooling() -> None:
    spiking = SpikingLayer("one", torch.nn.Identity(), None, LIF(surrogate=make_surrogate("triangle")))
    pool = torch.nn.AvgPool2d
    assert levels(spiking, None) == 1
    assert levels(torch.nn.Flatten(), 4) == 4
    assert [levels(module, 1) for module in (pool(2), pool(3), pool(4), pool(16), pool(2, padding=1))] == [
        *(4, None, 16, None, None)
    ]
    assert levels(pool(2), None) is levels(torch.nn.Conv2d(1, 1, 1), 1) is None


@pytest.mark.parametrize("changed", [{"training": {"recompute": "layers"}}, {"gate": {"max_drop": 0.5}}], ids=str)
def test_a_run_goes_on_with_settings_that_do_not_affect_it(
    changed: dict[str, Any], run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    train(small_recipe(**changed), tmp_path / "run", resume=True)


def test_a_run_does_not_go_on_with_another_recipe(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    with pytest.raises(InputError, match="resume with the same recipe"):
        train(small_recipe(training={"sync_norm": True}), tmp_path / "run", resume=True)


@pytest.mark.parametrize("training", memory.DEFENCES)
def test_what_is_kept_is_the_input_of_each_layer_alone(training: str) -> None:
    """Bytes an image: three steps of what layers receive, spikes and quarters in one byte each, and 64 float pixels.

    8 channels of 8x8 spikes are pooled to 4x4 inside their layer; then 16 of 4x4 twice, the last into the readout as
    floats, whose product with the steps' weights is kept twice.
    """
    found = memory.measure("vgg-small", (1, 8, 8), training, 3, "layers", batch=64, width=0.25)["kept"] / 64
    assert found == pytest.approx(3 * (64 * 4 + 8 * 16 + 16 * 16 + 16 * 16 * 4 + 2 * 10 * 4), rel=0.1)


def test_a_step_of_32_steps_and_128_images_fits_24_gib() -> None:
    counted = memory.measure("vgg11", (3, 32, 32), "empirical", 32, "layers")
    assert counted["peak"] < 8 * 2**30


@pytest.fixture
def images() -> Images:
    draw = np.random.default_rng(0)
    return Images(draw.integers(256, size=(6, 1, 4, 4), dtype=np.uint8), np.arange(6), tuple("abcdef"))


@pytest.mark.parametrize(("free", "there"), [(2 * 96, True), (2 * 96 - 1, False)])
def test_a_data_set_lives_on_the_gpu_as_bytes_if_half_of_it_is_enough(
    free: int, there: bool, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    assert batches.fits(images.pixels.nbytes, torch.device("cuda")) is there
    monkeypatch.setattr(batches, "fits", lambda size, device: there)
    pixels, classes = batches.to_device(images, torch.device("meta"))
    assert pixels.dtype == torch.uint8
    assert pixels.is_meta is classes.is_meta is there


def test_batches_of_a_set_in_host_memory_are_pinned_and_only_they(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    held = torch.from_numpy(images.pixels), torch.from_numpy(images.classes)
    index = torch.tensor([4, 1])
    pixels, classes = batches.take(held, index, torch.device("meta"))  # stands for a GPU: another device than the host
    assert pixels.is_meta
    assert classes.is_meta
    assert [tuple(tensor.shape) for tensor in pinned] == [(2, 1, 4, 4), (2,)]
    pixels, classes = batches.take(held, index, torch.device("cpu"))
    assert torch.equal(pixels, held[0][[4, 1]])
    assert classes.tolist() == [4, 1]
    assert len(pinned) == 2


def test_augmentation_runs_where_the_pixels_are() -> None:
    pixels = torch.empty(2, 1, 4, 4, dtype=torch.uint8, device="meta")
    assert batches.augment(pixels, padding=2, flip=True, draw=generator(0)).is_meta
