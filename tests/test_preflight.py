"""What would fail after the training is refused before its first epoch."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe

from mpdsgr_deploy import surrogates
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import MODELS, SpikingNet
from mpdsgr_deploy.models.spiking_net import build_model
from mpdsgr_deploy.recipe import Model, Recipe
from mpdsgr_deploy.training import preflight as module
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.preflight import preflight


@pytest.fixture(scope="module")
def images() -> Images:
    return load_training(small_recipe().data)[0]


def test_a_sound_recipe_passes(images: Images) -> None:
    preflight(small_recipe(), images)


def test_detached_resets_of_a_defences_own_neurons(images: Images) -> None:
    recipe = small_recipe(neuron={"detach_reset": True}, defence={"dlif": {}})
    with pytest.raises(InputError, match=r"neuron\.detach_reset works only for plain LIF neurons, which dlif"):
        preflight(recipe, images)


def test_a_batch_of_one_that_normalisation_refuses(images: Images) -> None:
    """Pooled to a single pixel, one image at one time step leaves tdBN one value per channel."""
    recipe = small_recipe(
        model={"name": "vgg11", "width": 0.0625}, encoding={"T": 1}, training={"batch_size": 1, "epochs": 1}
    )
    with pytest.raises(InputError, match=r"training step on 1 images would fail: .*; raise training\.batch_size"):
        preflight(recipe, images)


def test_a_model_over_2_gib_is_refused_without_being_built() -> None:
    images = Images(np.zeros((80, 3, 32, 32), np.uint8), np.zeros(80, np.int64), ("a", "b"))
    with pytest.raises(InputError, match="GiB of weights; an ONNX file holds 2 GiB at most"):
        preflight(small_recipe(model={"name": "vgg16", "width": 8}), images)


def test_a_surrogate_without_nodes(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = surrogates.SurrogateKind(
        derivative=surrogates.KINDS["triangle"].derivative,
        half_width=lambda width: width,
        width=1.0,
        narrows=False,
        source="a test",
    )
    monkeypatch.setitem(surrogates.KINDS.loaded, "without-nodes", kind)
    for recipe in (
        small_recipe(neuron={"surrogate": "without-nodes"}),
        small_recipe(attack={"surrogates": ["without-nodes"]}),
    ):
        with pytest.raises(InputError, match="without-nodes"):
            preflight(recipe, images)


def test_models_of_this_package_are_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("mpdsgr_deploy.experiments.variants")  # whose models are partial functions
    parts = {"vgg-small": MODELS["vgg-small"], "plain-3": MODELS["plain-3"], "outside": partial(json.loads)}
    monkeypatch.setattr(module, "MODELS", parts)
    recipes = {name: small_recipe().model_copy(update={"model": Model.model_construct(name=name)}) for name in parts}
    assert [name for name, recipe in recipes.items() if module._is_foreign(recipe)] == ["outside"]


def test_an_operator_without_a_rule_for_its_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of another package, whose readout ends in an operator that no rule differentiates."""

    def build(recipe: Recipe, shape: tuple[int, int, int], classes: int) -> object:
        small = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "vgg-small"})})
        network = build_model(small, shape, classes)
        network.__class__ = Cumulative
        return network

    class Cumulative(SpikingNet):
        def forward(self, x: Any, observe: Any = None, noise: Any = None) -> torch.Tensor:
            return super().forward(x, observe, noise).cumsum(1)

    build.__module__ = "another_package.models"
    monkeypatch.setitem(MODELS.loaded, "cumulative", build)
    exported: list[Recipe] = []
    check = module._check_export
    monkeypatch.setattr(module, "_check_export", lambda recipe, *rest: (exported.append(recipe), check(recipe, *rest)))
    with pytest.raises(InputError, match="without a rule for its gradient"):
        train(small_recipe(model={"name": "cumulative"}, encoding={"T": 1}), tmp_path / "run")
    assert len(exported) == 1
    assert not (tmp_path / "run" / "state.pt").exists()
