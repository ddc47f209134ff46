"""Mistakes before, during and after training: one line that says what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small_recipe

from mpdsgr_deploy.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.trained_networks import load_model
from mpdsgr_deploy.training import train


def test_runs_are_not_overwritten_nor_resumed_with_another_recipe(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume"):
        train(small_recipe(), run_dir)
    with pytest.raises(InputError, match=r"neuron\.tau, training\.epochs"):
        train(small_recipe(neuron={"tau": 0.9}, training={"epochs": 9}), run_dir, resume=True)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not a training run of mpdsgr"):
        train(small_recipe(), tmp_path)
    with pytest.raises(InputError, match="cannot use"):
        train(small_recipe(), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_run_of_before_a_defence_had_a_setting_goes_on_after_an_upgrade(tmp_path: Path) -> None:
    recipe = small_recipe(defence={"mpd-sgr": {}}, training={"epochs": 1})
    train(recipe, tmp_path / "run")
    file = tmp_path / "run" / "recipe.json"
    written = json.loads(file.read_text())
    del written["defence"]["mpd-sgr"]["window"]  # as it was written before there was one
    file.write_text(json.dumps(written))
    train(recipe, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"defence\.mpd-sgr"):
        train(small_recipe(defence={"mpd-sgr": {"eta": 3.0}}, training={"epochs": 1}), tmp_path / "run", resume=True)


def test_mistakes_surface_before_processes_start_and_leave_the_directory_free(tmp_path: Path) -> None:
    two = {"devices": 2, "accelerator": "cpu", "batch_size": 64}
    for sections, expected in (
        ({"model": {"name": "vgg-11"}}, "did you mean 'vgg11'"),
        ({"defence": {"mpd-sgr": {"estimator": "exact"}}}, "unknown estimator 'exact'"),
        ({"attack": {"surrogates": ["triangel"]}}, "did you mean 'triangle'"),
        ({"data": {"name": "mnist", "root": str(tmp_path)}}, "download=True"),
    ):
        with pytest.raises(InputError, match=expected):
            train(small_recipe(training=two, **sections), tmp_path / "run")
    train(small_recipe(training={"epochs": 1}), tmp_path / "run")


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lower training\.lr") as error:
        train(small_recipe(training={"lr": 1e30}), tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("recipe.json", b"{"), ("state.pt", b""), ("state.pt", b"PK")])
def test_a_damaged_run_is_one_line(name: str, content: bytes, run_dir: Path, tmp_path: Path) -> None:
    for file in ("recipe.json", "state.pt"):
        (tmp_path / file).write_bytes((run_dir / file).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is damaged") as error:
        train(small_recipe(), tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_unusable_hardware_and_batch_size_are_input_errors(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"training\.accelerator=cuda"):
            train(small_recipe(training={"accelerator": "cuda"}), tmp_path / "gpu")
    with pytest.raises(InputError, match="only 1170 training images"):
        train(small_recipe(training={"batch_size": 5000}), tmp_path / "large")


@pytest.mark.parametrize("damage", ["truncate weights", "truncate json", "newer", "weights elsewhere", "missing"])
def test_damaged_checkpoints_are_refused(run_dir: Path, tmp_path: Path, damage: str) -> None:
    checkpoint = load_checkpoint(run_dir / "last")
    path, file = tmp_path / "checkpoint.json", tmp_path / checkpoint.weights
    text = (run_dir / "last" / "checkpoint.json").read_text()
    content = (run_dir / "last" / checkpoint.weights).read_bytes()
    path.write_text(text)
    file.write_bytes(content)
    assert load_checkpoint(tmp_path) == checkpoint
    if damage == "truncate weights":
        file.write_bytes(content[:-100])
        expected = "damaged"
    elif damage == "truncate json":
        path.write_text(text[:200])
        expected = "damaged"
    elif damage == "newer":
        path.write_text(text.replace('"schema_version": 2', '"schema_version": 99'))
        expected = "schema version 99"
    elif damage == "weights elsewhere":
        path.write_text(text.replace(checkpoint.weights, "../" + checkpoint.weights))
        expected = "not in its directory"
    else:
        path.unlink()
        expected = "mpdsgr train"
    with pytest.raises(InputError, match=expected):
        load_checkpoint(find_checkpoint(tmp_path))


def test_weights_of_another_network_are_refused(run_dir: Path) -> None:
    checkpoint: Checkpoint = load_checkpoint(run_dir / "last")
    other = small_recipe(model={"width": 0.5})
    with pytest.raises(InputError, match="does not hold the weights"):
        load_model(run_dir / "last" / checkpoint.weights, other, checkpoint.shape, 10)
