"""The command as a user meets it: help with examples, errors in one line, files where it says they are."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import assert_input_error, mpdsgr, mpdsgr_here
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.cli import COMMANDS, main
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.recipe import Recipe, load_recipe


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0
    assert "Example:" in done.output
    assert f"mpdsgr {name}" in done.output


def test_the_list_of_commands_describes_each_in_a_whole_sentence() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output.partition("Commands:")[2].split("\n")
    sentences = [line.split(maxsplit=1) for line in listed if line.strip()]
    assert [name for name, _ in sentences] == list(COMMANDS)
    assert all(sentence.endswith(".") and not sentence.endswith("...") for _, sentence in sentences)


def test_usage_errors_are_exit_code_2() -> None:
    for arguments in (["tarin"], ["export"], ["predict", "x"], ["validate", "b", "--report", "r", "--limit", "0"]):
        assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize(("raised", "code"), [(RuntimeError("boom"), 3), (KeyboardInterrupt(), 130)])
def test_a_crash_or_an_interrupt_is_never_mistaken_for_a_failed_gate(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise raised

    monkeypatch.setattr("mpdsgr_deploy.cli.inspect.checkpoint_facts", fail)
    assert CliRunner().invoke(main, ["inspect", "anything"]).exit_code == code


def test_predict_images_folders_and_arrays(bundle: Bundle, tmp_path: Path) -> None:
    images = load_test(bundle.manifest.recipe.data)[:6]
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, pixels in enumerate(images.pixels):
        Image.fromarray(pixels[0]).save(folder / f"{i}.png")
    np.save(tmp_path / "all.npy", images.pixels)
    csv_out, npz_out, lines_out = (tmp_path / f"out.{suffix}" for suffix in ("csv", "npz", "jsonl"))
    for out in (csv_out, npz_out, lines_out):
        done = mpdsgr("predict", bundle.path, folder, tmp_path / "all.npy", "--batch", 4, "--out", out)
        assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(csv_out.read_text().splitlines()))
    arrays = np.load(npz_out)
    lines = [json.loads(line) for line in lines_out.read_text().splitlines()]
    assert [row["input"] for row in rows] == arrays["inputs"].tolist() == [line["input"] for line in lines]
    assert [row["label"] for row in rows] == [images.labels[k] for k in arrays["classes"]]
    assert arrays["logits"].shape == (12, 10)
    np.testing.assert_allclose(arrays["logits"][:6], arrays["logits"][6:], atol=1e-5)  # PNG and array: same pixels
    assert all(0.1 <= line["probability"] <= 1 for line in lines)
    done = mpdsgr("predict", bundle.path, folder / "0.png")
    assert done.stdout.splitlines()[0] == "input,label,probability"


def test_predict_refuses_bad_input(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "nan.npy", np.full((1, 1, 8, 8), np.nan, np.float32))
    np.save(tmp_path / "large.npy", np.zeros((1, 3, 32, 32), np.float32))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, expected in (
        ("nan.npy", "finite"),
        ("large.npy", "shape"),
        ("text.png", "cannot decode"),
        ("empty", "no images"),
        ("gone.png", "does not exist"),
    ):
        assert_input_error(mpdsgr("predict", bundle.path, tmp_path / name, "--out", tmp_path / "o.csv"), expected)
    assert not (tmp_path / "o.csv").exists()
    for out in (tmp_path / "text.png" / "o.csv", tmp_path / f"{'n' * 250}.csv"):
        np.save(tmp_path / "good.npy", np.zeros((1, 1, 8, 8), np.uint8))
        assert_input_error(mpdsgr("predict", bundle.path, tmp_path / "good.npy", "--out", out), "cannot write")
    assert_input_error(mpdsgr("predict", bundle.path, tmp_path / "nan.npy", "--out", tmp_path / "o.pickle"), ".jsonl")


def test_errors_of_other_commands_are_one_line(bundle: Bundle, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    root = ["--set", f"data.root={tmp_path}"]
    assert_input_error(mpdsgr_here("train", "digits-reg", "--set", "neuron.tua=1"), "unknown key 'neuron.tua'")
    assert_input_error(
        mpdsgr_here("train", "cifar10-vgg11-quarter-reg", *root, "--out", tmp_path / "a"), "download=True"
    )
    assert_input_error(mpdsgr_here("train", "digits-reg", "--out", tmp_path / "mine"), "not a training run")
    assert_input_error(mpdsgr_here("export", tmp_path / "mine", "--out", tmp_path / "b"), "mpdsgr train")
    assert_input_error(mpdsgr_here("export", run_dir, "--out", tmp_path / "b", "--precision", "int4"), "fp32")
    assert_input_error(mpdsgr_here("validate", tmp_path / "mine", "--report", tmp_path / "r"), "not a bundle")
    assert_input_error(mpdsgr_here("validate", bundle.path, "--report", tmp_path / "mine"), "not a report")
    assert_input_error(mpdsgr_here("inspect", tmp_path / "mine"), "checkpoint.json")


def test_a_missing_extra_is_named(bundle: Bundle, run_dir: Path, tmp_path: Path) -> None:
    """A process that cannot import torch, onnxruntime or matplotlib, as where the extra was not installed."""
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), np.uint8))
    for module, extra, arguments in (
        ("lightning_fabric", "train", ["train", "digits-reg", "--out", str(tmp_path / "run")]),
        ("onnxruntime", "cpu", ["predict", str(bundle.path), str(tmp_path / "x.npy")]),
        ("pyarrow", "parquet", ["predict", str(bundle.path), str(tmp_path), "--out", str(tmp_path / "x.parquet")]),
        ("matplotlib", "report", ["inspect", str(run_dir), "--plots", str(tmp_path / "plots")]),
    ):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('not installed')")
        done = mpdsgr(*arguments, PYTHONPATH=str(tmp_path))
        assert_input_error(done, module, f"mpdsgr-deploy[{extra}]")
        (tmp_path / module / "__init__.py").unlink()
        (tmp_path / module).rmdir()


def test_inspect_doctor_and_recipes(bundle: Bundle, run_dir: Path, tmp_path: Path) -> None:
    facts = json.loads(mpdsgr("inspect", bundle.path, "--json").stdout)
    assert facts["fp32 parameters"] > 1000
    assert "Conv" in facts["fp32 nodes"]
    assert "on the first 100 test images of digits, tier commit, eps 25.5/255: clean 9" in facts["promised"]
    layers = json.loads(mpdsgr("inspect", run_dir, "--json").stdout)["layers"]
    assert [layer["layer"] for layer in layers] == ["conv1", "conv2", "conv3"]
    assert "firing rate" in mpdsgr("inspect", run_dir, COLUMNS="200").stdout
    quick = 'from mpdsgr_deploy.runtime import BACKENDS; del BACKENDS.loaded["torch-compile"]'  # it takes seconds
    doctor = json.loads(mpdsgr("doctor", bundle.path, "--json", prelude=quick).stdout)
    assert doctor["backends"]["onnxruntime-cpu"]["fp32"].startswith("works")
    assert doctor["backends"]["torch"]["fp32"].startswith("works")
    assert "mpdsgr-deploy[gpu]" in doctor["backends"]["onnxruntime-cuda"]["fp32"]
    assert_input_error(mpdsgr("doctor", tmp_path), "not a bundle")
    listed = json.loads(mpdsgr("recipes", "--json").stdout)
    assert listed["digits-mpdsgr"] == {"title": "MPD-SGR on the digits.", "published": None}
    assert listed["cifar10-vgg11-mpdsgr"]["published"]["fgsm"] == 47.59
    assert mpdsgr("recipes", "--copy", "digits-reg", cwd=tmp_path).returncode == 0
    assert (tmp_path / "digits-reg.toml").read_text().startswith("#")
    assert_input_error(mpdsgr("recipes", "--copy", "digits-reg", cwd=tmp_path), "already exists")


def test_demo_shows_that_the_exported_network_is_equal_and_damaged_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, overrides: tuple[str, ...]) -> Recipe:  # `make demo` trains at full length
        small = (
            "training.epochs=4",
            "training.pictures=0",
            "model.width=0.25",
            "encoding.T=2",
            "attack.strong_steps=10",
        )
        small += ("validation.limit=20", "gate.images=20", "gate.max_drop=0.5")
        recipe = load_recipe(path, (*overrides, *small))
        return recipe.model_copy(update={"defence": {}})

    monkeypatch.setattr("mpdsgr_deploy.cli.demo.load_recipe", load)
    monkeypatch.setenv("COLUMNS", "120")
    done = mpdsgr_here("demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    names = ("torch ", "exported to ONNX ", "damaged copy  ")
    shown = [re.split(r" {2,}", line) for line in done.stdout.splitlines() if line.startswith(names)]
    torch, exported, damaged = shown
    assert (torch[0], exported[0], damaged[0]) == ("torch", "exported to ONNX", "damaged copy")
    assert torch[1:5] == exported[1:5]  # `worst` has attacks whose search amplifies the last bit
    assert damaged[5] == "-"  # how accurate it is by chance does not matter: its answers differ
    assert "exported network: PASS" in done.stdout
    assert "model.fp32.onnx does not match its hash in manifest.json" in done.stdout
    assert "damaged copy with new hashes: FAIL: " in done.stdout
    for report, row in (("report", exported), ("report-damaged", damaged)):
        rows = json.loads((tmp_path / "demo" / report / "report.json").read_text())["rows"]
        assert float(row[1]) == pytest.approx(100 * rows[0]["artefact"]["accuracy"], abs=0.06)


def test_train_without_a_name_trains_what_the_measured_tables_favour(tmp_path: Path) -> None:
    small = ("training.epochs=1", "training.pictures=0", "model.width=0.25")
    done = mpdsgr_here("train", *(word for s in small for word in ("--set", s)), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = load_checkpoint(tmp_path / "run" / "last").recipe
    assert (found.data.name, found.method) == ("digits", "AT + SR")


@pytest.mark.parametrize("name", ["bundles", "recipes", "train"])
def test_a_command_that_needs_no_runtime_loads_none(name: str) -> None:
    code = f"import sys; from mpdsgr_deploy.cli import main; main.get_command(None, {name!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"mpdsgr_deploy.cli.{name}" in loaded
    assert {"onnx", "torch", "mpdsgr_deploy.runtime"}.isdisjoint(loaded)
