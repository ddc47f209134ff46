"""Time steps that grow during training, averaged weights, and training that starts from a checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_recipe
from safetensors.torch import load_file
from torch.nn import functional as F

from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.models.time_steps import set_time_steps
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import TdBN
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.training import train, training_run
from mpdsgr_deploy.training.epoch import measure_statistics, update_average
from mpdsgr_deploy.training.stages import recipe_at

SHAPE = (1, 8, 8)
STAGED = {"epochs": 3, "stages": [{"epochs": 1, "T": 1}, {"epochs": 1, "T": 2}]}


def recipe_of(**sections: dict[str, object]) -> Recipe:
    """The small recipe on few images, four steps an epoch."""
    return small_recipe(**{"encoding": {"T": 3}, **sections, "data": {"train_images": 260}})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last" / load_checkpoint(out / "last").weights)


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupted(recipe: Recipe, out: Path, *, after: int, monkeypatch: pytest.MonkeyPatch, **options: Path) -> None:
    """Train, die after so many epochs, and resume."""
    whole = training_run.train_epoch

    def dying(learner, data, epoch):
        if epoch == after:
            raise KeyboardInterrupt
        return whole(learner, data, epoch)

    monkeypatch.setattr(training_run, "train_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, **options)
    monkeypatch.setattr(training_run, "train_epoch", whole)
    train(recipe, out, resume=True)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stages") / "run"
    train(recipe_of(training={**STAGED, "average": 0.9}), out)
    return out


def test_a_stage_at_the_encodings_steps_changes_no_bit(tmp_path: Path) -> None:
    train(recipe_of(training={"epochs": 2}), tmp_path / "plain")
    train(recipe_of(training={"epochs": 2, "stages": [{"epochs": 1, "T": 3}]}), tmp_path / "staged")
    assert_equal_weights(tmp_path / "plain", tmp_path / "staged")


def test_stages_and_the_average_resume_bit_for_bit(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(training={**STAGED, "average": 0.9})
    interrupted(recipe, tmp_path / "run", after=2, monkeypatch=monkeypatch)
    assert_equal_weights(staged, tmp_path / "run")
    assert [entry["T"] for entry in load_checkpoint(tmp_path / "run" / "last").history] == [1, 2, 3]


def test_a_checkpoint_says_the_steps_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut in its first stage left a network of that stage's T, with the accuracy it was logged with."""
    recipe = recipe_of(training=STAGED)
    monkeypatch.setattr(training_run, "recipe_at", lambda recipe, epoch: recipe_at(recipe, 0))
    train(recipe, tmp_path / "run")
    checkpoint, model = load_network(tmp_path / "run" / "last")
    assert (checkpoint.recipe.encoding.T, model.T) == (1, 1)
    _, validation = load_training(recipe.data)
    with torch.no_grad():
        answers = model(torch.from_numpy(validation.unit())).argmax(1).numpy()
    assert np.mean(answers == validation.classes) == pytest.approx(checkpoint.metrics["validation_accuracy"], abs=0.008)


def test_the_best_checkpoint_is_of_the_last_stage(staged: Path) -> None:
    best = load_checkpoint(staged / "best")
    assert best.recipe.encoding.T == 3
    assert best.epoch == 3


@pytest.mark.parametrize("readout", ["mean", "membrane"])
def test_a_network_at_other_steps_is_the_one_built_with_them(readout: str) -> None:
    short = recipe_of(model={"readout": readout}, encoding={"T": 2})
    long = recipe_of(model={"readout": readout}, encoding={"T": 5})
    staged, built = build_model(short, SHAPE, 10).eval(), build_model(long, SHAPE, 10).eval()
    built.load_state_dict(staged.state_dict())
    set_time_steps(staged, long, SHAPE)
    x = torch.rand(4, *SHAPE)
    assert torch.equal(staged(x), built(x))


def batch_means(model: SpikingNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean of what each tdBN receives on x [B, C, H, W], normalised by the batch's own statistics."""
    means: dict[str, torch.Tensor] = {}
    hooks = [
        part.register_forward_pre_hook(
            lambda _, inputs, name=name: means.update({name: inputs[0].detach().mean((0, 2, 3))})
        )
        for name, part in model.named_modules()
        if isinstance(part, TdBN)
    ]
    with torch.no_grad():
        model.train()(x)
    for hook in hooks:
        hook.remove()
    return means


def test_tdbn_statistics_belong_to_the_last_stages_steps(tmp_path: Path) -> None:
    """Sixty steps after the change they are nearer, layer by layer, to those of T = 3 than to those of T = 1."""
    recipe = recipe_of(training={"epochs": 4, "batch_size": 13, "lr": 0.02, "stages": [{"epochs": 1, "T": 1}]})
    train(recipe, tmp_path / "run")
    _, model = load_network(tmp_path / "run" / "last")
    running = {name: part.running_mean.clone() for name, part in model.named_modules() if isinstance(part, TdBN)}
    training, _ = load_training(recipe.data)
    x = torch.from_numpy(training.unit())
    at_last = batch_means(model, x)
    set_time_steps(model, recipe_at(recipe, 0), SHAPE)
    at_first = batch_means(model, x)
    deeper = list(running)[1:]  # direct coding shows the first layer the same image at every step
    assert deeper
    for name in deeper:
        wrong, right = ((running[name] - means[name]).norm() for means in (at_first, at_last))
        assert right < 0.3 * wrong


def test_the_average_by_hand() -> None:
    """Steps 0 and 1 keep 1/10 and 2/11 of the average before them, or the decay where that is less."""
    average, model = (build_model(recipe_of(), SHAPE, 10) for _ in range(2))
    first, second = average.readout.weight.clone(), model.readout.weight.clone()
    update_average(average, model, decay=0.9, step=0)
    after_one = first / 10 + 9 * second / 10
    assert torch.allclose(average.readout.weight, after_one)
    update_average(average, model, decay=0.15, step=1)
    assert torch.allclose(average.readout.weight, 0.15 * after_one + 0.85 * second)


def test_statistics_are_means_over_the_batches() -> None:
    model = build_model(recipe_of(), SHAPE, 10)
    batches = [torch.rand(8, *SHAPE) for _ in range(3)]
    measure_statistics(model, batches, torch.Generator())
    first = next(name for name, part in model.named_modules() if isinstance(part, TdBN))
    expected = torch.stack([batch_means(model, x)[first] for x in batches]).mean(0)
    measure_statistics(model, batches, torch.Generator())  # batch_means has moved them
    assert torch.allclose(model.get_submodule(first).running_mean, expected, atol=1e-6)
    assert model.get_submodule(first).momentum == 0.1
    assert not model.training


def test_what_is_saved_is_the_average(staged: Path) -> None:
    state = torch.load(staged / "state.pt", weights_only=True)
    saved = weights(staged)
    assert all(torch.equal(saved[name], state["average"][name]) for name in saved)
    assert not torch.equal(state["average"]["readout.weight"], state["model"]["readout.weight"])


def test_label_smoothing_enters_the_loss(tmp_path: Path) -> None:
    train(recipe_of(training={"epochs": 1, "label_smoothing": 1.0, "weight_decay": 0.0}), tmp_path / "run")
    history = load_checkpoint(tmp_path / "run" / "last").history
    uniform = F.cross_entropy(torch.zeros(1, 10), torch.zeros(1, dtype=torch.int64)).item()
    assert history[-1]["loss"] >= uniform  # the least that a uniform target allows
    assert history[-1]["validation_accuracy"] < 0.5


def test_training_starts_from_a_checkpoints_weights(staged: Path, tmp_path: Path) -> None:
    still = {"epochs": 1, "lr": 1e-12, "momentum": 0.0, "weight_decay": 0.0}
    train(recipe_of(training=still), tmp_path / "run", init=staged / "last")
    before, after = weights(staged), weights(tmp_path / "run")
    learned = [name for name in before if "running" not in name]
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in learned)
    origin = load_checkpoint(tmp_path / "run" / "last").init
    source = load_checkpoint(staged / "last")
    assert origin is not None
    assert (origin["weights_sha256"], origin["epoch"]) == (source.weights_sha256, 3)
    assert origin["recipe"] == source.recipe.model_dump(mode="json")


def test_fine_tuning_resumes_bit_for_bit_and_keeps_its_origin(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(training={"epochs": 2, "average": 0.9})
    train(recipe, tmp_path / "whole", init=staged / "last")
    interrupted(recipe, tmp_path / "run", after=1, monkeypatch=monkeypatch, init=staged / "last")
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
    origins = [load_checkpoint(tmp_path / name / "last").init for name in ("whole", "run")]
    assert origins[0] == origins[1]
    train(recipe, tmp_path / "run", resume=True, init=staged / "last")
    with pytest.raises(InputError, match="did not start from"):
        train(recipe, tmp_path / "run", resume=True, init=tmp_path / "whole" / "last")


def test_what_a_defence_adds_starts_as_in_a_run_from_nothing(staged: Path, tmp_path: Path) -> None:
    train(recipe_of(training={"epochs": 1}, defence={"dlif": {}}), tmp_path / "run", init=staged / "last")
    assert load_checkpoint(tmp_path / "run" / "last").init is not None


@pytest.mark.parametrize("changed", [{"width": 0.5}, {"norm": "none"}, {"norm": "bn"}])
def test_weights_of_another_network_are_no_start(staged: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    recipe = recipe_of(model=changed, training={"epochs": 1})
    with pytest.raises(InputError, match="do not fit this recipe"):
        train(recipe, tmp_path / "run", init=staged / "last")


def test_stages_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of epochs = 3 is left"):
        recipe_of(training={"stages": [{"epochs": 3, "T": 1}]})
    for sections, expected in (
        ({"encoding": {"name": "frequency", "T": 3}}, "steps are alike"),
        ({"defence": {"dlif": {}}}, "learn one value for each"),
    ):
        with pytest.raises(InputError, match=expected):
            train(recipe_of(training=STAGED, **sections), tmp_path / "run")
