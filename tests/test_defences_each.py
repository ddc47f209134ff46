"""Every defence in the company of others: one training step, a checkpoint, and room for a ninth."""

from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from lightning_fabric import Fabric
from safetensors.torch import save_file

from mpdsgr_deploy.defences import DEFENCES, Defence, Step, Term, base, build_defended
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import Positive, Section
from mpdsgr_deploy.trained_networks import load_model
from mpdsgr_deploy.training.epoch import Learner, train_epoch

SHAPE = (1, 8, 8)
EACH = sorted({*DEFENCES} - {"at"})
AT = {"at": {"eps": 0.1, "steps": 2, "step": 0.05}}
MPDSGR = {"mpd-sgr": {"estimator": "empirical"}}
PAIRS = [
    *({**AT, name: {}} for name in EACH if name not in ("mpd-sgr", "trades")),
    {"trades": {}, "sr": {}, **MPDSGR},
    {**AT, **MPDSGR},
    *({**MPDSGR, name: {}} for name in ("feel", "dlif", "stog")),
    {**AT, "rat": {}, "sr": {}, "stog": {}, **MPDSGR},
]


def recipe_with(defence: dict[str, dict[str, object]]) -> Recipe:
    """The small recipe with these defences and what they ask for."""
    return small_recipe(
        defence=defence,
        encoding={"name": "frequency" if "feel" in defence else "direct"},
        training={"batch_size": 16, "epochs": 1, "weight_decay": 0.0 if "rat" in defence else 5e-4},
    )


def learner_of(recipe: Recipe) -> Learner:
    torch.manual_seed(0)
    model, defences = build_defended(recipe, SHAPE, 10)
    fabric = Fabric(accelerator="cpu", devices=1, precision=recipe.training.precision)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return Learner(fabric, recipe, wrapped, model, defences, optimizer)


def step_once(learner: Learner) -> dict[str, float]:
    """One step on a batch of random images."""
    pixels = torch.randint(256, (16, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return train_epoch(learner, (pixels, torch.arange(16) % 10), 0)


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """The gradient of every parameter by its id, as the optimiser of the test meets it."""
    seen: dict[int, torch.Tensor] = {}
    step = torch.optim.SGD.step

    def spying(self: torch.optim.SGD, *arguments: object) -> object:
        seen.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spying)
    return seen


@pytest.mark.parametrize("defence", PAIRS, ids="+".join)
def test_a_step_with_several_defences_has_finite_gradients_for_every_parameter(
    defence: dict[str, dict[str, object]], gradients: dict[int, torch.Tensor]
) -> None:
    learner = learner_of(recipe_with(defence))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    measured = step_once(learner)
    for name, p in learner.model.named_parameters():
        assert torch.isfinite(gradients[id(p)]).all(), name
        assert not torch.equal(p, before[name]), name
    terms = {"mpd-sgr": "omega", "sr": "sparsity", "dlif": "perturbation", "stog": "gate_prior"}
    terms |= {"trades": "divergence", "tgo": "threshold_guard"}
    expected = {terms[name] for name in defence if name in terms and (name != "dlif" or "at" in defence)}
    weights = {f"{name}_weight" for name in expected}
    assert set(measured) == {"loss", "cross_entropy", "train_accuracy", *expected, *weights}


@pytest.mark.parametrize("name", ["feel", "dlif", "stog"])
def test_mixed_precision_trains_them_as_well(name: str) -> None:
    plain = recipe_with({**AT, "sr": {}, **MPDSGR, name: {}})
    mixed = plain.model_copy(update={"training": plain.training.model_copy(update={"precision": "bf16-mixed"})})
    expected, measured = step_once(learner_of(plain)), step_once(learner_of(mixed))
    assert measured["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=0.1)
    assert measured["omega"] == pytest.approx(expected["omega"], rel=0.1)


@pytest.mark.parametrize("name", EACH)
def test_what_was_learned_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    recipe = recipe_with({**({} if name == "trades" else AT), name: {}})
    learner = learner_of(recipe)
    step_once(learner)
    model = learner.model.eval()
    save_file(model.state_dict(), tmp_path / "weights")
    loaded = load_model(tmp_path / "weights", recipe, SHAPE, 10)
    x = torch.rand(8, *SHAPE)
    seeds = (torch.Generator().manual_seed(7) for _ in range(2))
    assert torch.equal(loaded(x, None, next(seeds)), model(x, None, next(seeds)))
    plain = recipe_with(AT)
    if any("neuron" in key for key in model.state_dict()):
        with pytest.raises(InputError, match="does not hold the weights"):
            load_model(tmp_path / "weights", plain, SHAPE, 10)


@pytest.mark.parametrize("pair", [("feel", "dlif"), ("dlif", "stog"), ("stog", "feel")])
def test_two_defences_that_change_the_neurons_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="two defences replace the neurons"):
        build_defended(recipe_with({name: {} for name in pair}), SHAPE, 10)


def test_another_defence_takes_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that its file would hold: settings, a class, a decorator. This one draws the logits to zero."""
    monkeypatch.setattr(DEFENCES, "loaded", dict(DEFENCES.loaded))  # a copy, which goes with the test

    class Settings(Section):
        weight: Positive = 0.1

    @base.register("calm", Settings)
    class Calm(Defence[Settings]):
        def term(self, step: Step) -> Term:
            return Term("energy", self.settings.weight, step.logits.square().mean())

    recipe = recipe_with({"calm": {"weight": 2.0}})
    measured = step_once(learner_of(recipe))
    assert recipe.method == "CALM"
    assert measured["loss"] == pytest.approx(measured["cross_entropy"] + 2 * measured["energy"])
