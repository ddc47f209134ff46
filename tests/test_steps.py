"""A network's first N of T time steps: what it answers, how it is exported, and how N is chosen."""

import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_input_error, mpdsgr, mpdsgr_here, once, small_recipe
from stochastic_networks import warmed_up
from test_resume import Counted

from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.attacks.resumable_run import Journal
from mpdsgr_deploy.bundle import WEIGHTS, Bundle, open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.exporting.rebuild import rebuild_faults
from mpdsgr_deploy.exporting.step_search import step_files
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.time_steps import first_steps
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.torch_model import TorchModel, noise_inputs
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.training import train
from mpdsgr_deploy.validation.card import card

SHAPE, T = (1, 8, 8), 3
KINDS = {
    "direct": {},
    "membrane": {"model": {"readout": "membrane"}},
    "poisson": {"encoding": {"name": "poisson"}},
    "sqe": {"encoding": {"name": "sqe", "levels": 3}},
    "rsc and stog": {"encoding": {"name": "rsc"}, "defence": {"stog": {}}},
    "feel": {"encoding": {"name": "frequency"}, "defence": {"feel": {}}},
    "dlif": {"defence": {"dlif": {}}},
}
EXPORTED = ("direct", "poisson", "feel")  # the exporter takes its time
KILLED_IN_THE_SECOND_ROW = """
import os, signal
from mpdsgr_deploy.attacks.resumable_run import Journal
put, finish = Journal.put, Journal.finish
left = []

def finish_and_count(self, verdicts):
    finish(self, verdicts)
    left.append(2)

def put_or_die(self, name, part):
    put(self, name, part)
    if left:
        left[-1] -= 1
        if not left[-1]:
            os.kill(os.getpid(), signal.SIGKILL)

Journal.put, Journal.finish = put_or_die, finish_and_count
"""


def recipe_of(kind: str, steps: int = T, **sections: dict[str, object]) -> Recipe:
    kinds = KINDS[kind]
    return small_recipe(**{**kinds, "encoding": {**kinds.get("encoding", {}), "T": steps}, **sections})


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of the small recipe at three steps."""
    return once(tmp_path_factory, "run-of-three-steps", lambda out: train(recipe_of("direct"), out))


@cache
def network(kind: str) -> tuple[SpikingNet, Recipe]:
    """A random network of T steps whose layers all fire and whose steps, where they learn their own values, differ."""
    recipe = recipe_of(kind)
    return warmed_up(recipe), recipe


@torch.no_grad()
def outputs(model: SpikingNet, x: np.ndarray) -> list[torch.Tensor]:
    """What the last linear layer gives at each of the T steps, with the noise that each image always gets."""
    seen: list[torch.Tensor] = []
    inputs = noise_inputs(model, SHAPE)
    noise = NoiseSource(inputs, 0)(x)
    hook = model.readout.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(torch.from_numpy(x), None, [torch.from_numpy(noise[entry.name]) for entry in inputs])
    hook.remove()
    return [torch.nn.functional.linear(spikes, model.readout.weight, model.readout.bias) for spikes in seen[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_steps_answer_with_the_mean_of_their_outputs(kind: str, tmp_path: Path) -> None:
    model, recipe = network(kind)
    x = np.random.default_rng(0).random((20, *SHAPE), np.float32)
    by_step = outputs(model, x)
    assert compare(sum(by_step).numpy(), T * by_step[0].numpy()).labels_differ  # the steps do not answer alike
    for N in range(1, T + 1):
        weights = [recipe.neuron.tau ** (N - t) if kind == "membrane" else 1 / N for t in range(1, N + 1)]
        expected = sum(w * y for w, y in zip(weights, by_step, strict=False)).numpy()
        shortened, own = first_steps(model, recipe, SHAPE, N)
        torch.testing.assert_close(torch.from_numpy(TorchModel(shortened, SHAPE)(x)), torch.from_numpy(expected))
        assert own.encoding.T == shortened.T == N
        if N < T and (N == 1 or kind == "direct") and kind in EXPORTED:
            step = step_files(model, recipe, SHAPE, N, {"fp32": {}}, tmp_path)["fp32"]
            with OnnxRuntime(step.file, noise=NoiseSource(step.noise, 0)) as artefact:
                assert compare(expected, artefact(x)).holds
    assert model.T == T  # and is as it was
    assert compare(sum(by_step).numpy() / T, TorchModel(model, SHAPE)(x)).holds or kind == "membrane"


def test_steps_that_there_are_not_are_refused() -> None:
    model, recipe = network("direct")
    for wrong in (0, T + 1):
        with pytest.raises(InputError, match="has 3 time steps"):
            first_steps(model, recipe, SHAPE, wrong)
    frames = small_recipe(encoding={"name": "frames", "T": T})
    events, _ = build_defended(frames, (3, 8, 8), 10)
    with pytest.raises(InputError, match="would not see its end"):
        first_steps(events, frames, (3, 8, 8), 2)
    model, recipe = network("dlif")
    longer = recipe.model_copy(update={"encoding": recipe.encoding.model_copy(update={"T": T + 1})})
    with pytest.raises(InputError, match="have parameters for 3 time steps and cannot compute 4"):
        first_steps(model, longer, SHAPE, T + 1)


@pytest.fixture(scope="module")
def short(three_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The first two of the three steps of the small network, in two precisions."""
    options = {"steps": 2, "precisions": ["int8"], "limit": 30}
    return open_bundle(once(tmp_path_factory, "short", lambda out: export(three_steps, out, **options)))


def test_a_bundle_of_fewer_steps_says_so_and_rebuilds(short: Bundle, three_steps: Path) -> None:
    manifest = short.manifest
    assert (manifest.recipe.encoding.T, manifest.trained_steps) == (2, 3)
    source = find_checkpoint(three_steps)
    assert short.file(WEIGHTS).read_bytes() == (source / load_checkpoint(source).weights).read_bytes()
    assert not rebuild_faults(short)
    assert "T = 2 of the 3 it was trained with" in card(short)
    x = short.golden()[0]
    checkpoint, model = load_network(source)
    shortened, _ = first_steps(model, checkpoint.recipe, SHAPE, 2)
    for backend in ("torch", "onnxruntime-cpu"):
        with open_predictor(short, backend) as predictor:
            assert compare(TorchModel(shortened, SHAPE)(x), predictor(x)).holds
    promised = short.reference()
    assert promised is not None
    assert promised.verdicts[CLEAN].sum() == short.manifest.variants["fp32"].accuracy.correct


def test_a_bundle_of_all_steps_has_the_manifest_it_had(bundle: Bundle) -> None:
    assert bundle.manifest.trained_steps is None
    assert bundle.manifest.digest == bundle.manifest.computed_digest()
    assert "trained_steps" not in bundle.manifest.model_dump(exclude_defaults=True)


def test_export_takes_the_fewest_steps_and_goes_on_after_a_kill(
    three_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPDSGR_CACHE", str(tmp_path / "cache"))
    attacked = []
    finish = Journal.finish
    monkeypatch.setattr(Journal, "finish", lambda self, verdicts: (attacked.append(verdicts), finish(self, verdicts)))
    command = (
        "export",
        three_steps,
        "--out",
        tmp_path / "b",
        "--steps",
        "auto",
        "--max-drop",
        0.9,
        "--limit",
        10,
        "--json",
    )
    assert mpdsgr(*command, prelude=KILLED_IN_THE_SECOND_ROW).returncode == -signal.SIGKILL
    done = mpdsgr_here(*command)
    assert done.returncode == 0, done.stderr
    assert len(attacked) == 2  # two steps and one; three were attacked before the kill
    record = json.loads(done.stdout)["steps"]
    assert (record["exported"], record["trained"], len(record["tried"])) == (1, 3, 2)
    assert open_bundle(tmp_path / "b").manifest.recipe.encoding.T == 1
    assert not [*(tmp_path / "cache" / "steps").iterdir()]


@pytest.mark.parametrize(("value", "message"), [("0", "not '0'"), ("many", "or auto"), ("4", "has 3 time steps")])
def test_a_wrong_number_of_steps_is_one_line(value: str, message: str, three_steps: Path, tmp_path: Path) -> None:
    assert_input_error(mpdsgr_here("export", three_steps, "--out", tmp_path / "b", "--steps", value), message)


@pytest.mark.parametrize("kind", ["direct", "feel"])
def test_a_run_at_fewer_steps_starts_from_a_longer_one(kind: str, three_steps: Path, tmp_path: Path) -> None:
    if kind == "direct":
        source = three_steps
    else:
        train(recipe_of(kind, training={"epochs": 1}, data={"train_images": 65}), tmp_path / "long")
        source = tmp_path / "long"
    recipe = recipe_of(kind, 2, training={"epochs": 1, "lr": 1e-9}, data={"train_images": 65})
    train(recipe, tmp_path / "short", init=find_checkpoint(source))
    checkpoint, model = load_network(find_checkpoint(source))
    before, _ = first_steps(model, checkpoint.recipe, SHAPE, 2)
    _, after = load_network(tmp_path / "short" / "last")
    learned = dict(after.named_parameters())
    for name, values in before.named_parameters():
        torch.testing.assert_close(learned[name], values, atol=1e-5, rtol=0)


@pytest.fixture
def costs(short: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], int]]:
    """What `inspect --steps` prints, and how many batches it attacked to know it."""
    monkeypatch.setattr("mpdsgr_deploy.exporting.step_table.ROUNDS", 1)
    monkeypatch.setenv("MPDSGR_CACHE", str(tmp_path / "cache"))

    def run(*options: object) -> tuple[dict[str, Any], int]:
        with monkeypatch.context() as patch:
            counted = Counted(patch)
            done = mpdsgr_here("inspect", short.path, "--steps", "--json", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), len(counted.firsts)

    return run


def test_inspect_steps_goes_on_after_a_kill(short: Bundle, costs: Callable, tmp_path: Path) -> None:
    whole, attacked = costs("--limit", 8)
    killed = mpdsgr("inspect", short.path, "--steps", "--limit", 8, prelude=KILLED_IN_THE_SECOND_ROW)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    table, again = costs("--limit", 8)
    assert again == attacked - attacked // 4 - 2  # of four rows the first, and two batches of the second
    for row in (*whole["steps"], *table["steps"]):
        row.pop("milliseconds")
    assert table == whole
    assert not [*(tmp_path / "cache" / "steps").iterdir()]


def test_inspect_shows_what_each_number_of_steps_costs(short: Bundle, costs: Callable, tmp_path: Path) -> None:
    record, _ = costs("--limit", 20, "--plots", tmp_path / "plots")
    rows = record["steps"]
    assert record["measured on"] == "the first 20 test images of digits"
    assert [(row["precision"], row["steps"]) for row in rows] == [(p, t) for p in ("fp32", "int8") for t in (1, 2)]
    promised = short.reference()
    assert promised is not None
    for row in rows:
        assert row["correct"][WORST] <= row["correct"]["pgd"] <= row["correct"][CLEAN] <= row["n"] == 20
        lost, regained, _ = row["flips"][CLEAN].values()
        full = next(other for other in rows if (other["precision"], other["steps"]) == (row["precision"], 2))
        assert full["correct"][CLEAN] - row["correct"][CLEAN] == lost - regained
        assert row["macs"] > 0
        assert all(value > 0 for value in row["milliseconds"].values())
    assert rows[1]["correct"][CLEAN] == promised.verdicts[CLEAN][:20].sum()
    assert rows[0]["macs"] < rows[1]["macs"]
    assert (tmp_path / "plots" / "steps.png").stat().st_size > 10_000


def test_inspect_steps_needs_a_bundle_with_weights(three_steps: Path, short: Bundle) -> None:
    assert_input_error(mpdsgr_here("inspect", three_steps, "--steps"), "is not one")
