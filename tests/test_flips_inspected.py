"""What `inspect` says of flipped spikes, and what it refuses to compare."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.diagnostics.facts import spans
from mpdsgr_deploy.diagnostics.spike_flips import SpikeFlips, StepFlips, flips_of
from mpdsgr_deploy.diagnostics.trace import Recorder
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.runtime.firing import FiringRates


def test_inspect_shows_the_variants_and_their_flips(precise: Bundle, tmp_path: Path) -> None:
    arguments = ["inspect", str(precise.path), "--flips", "--images", "30", "--plots", str(tmp_path / "plots")]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["measured on"] == "the first 30 test images of digits"
    assert [record["precision"] for record in shown["flips"]] == ["fp16", "int8", "fp8"]
    expected = flips_of(precise, images=30)[1]
    for record, flips in zip(shown["flips"], expected, strict=True):
        steps = [StepFlips(**step) for step in record.pop("steps")]
        assert SpikeFlips(**record, steps=steps) == flips
    assert shown["int8 layers"] == "conv1 fp32, conv2 to conv3 int8, readout fp32"
    assert shown["fp16 layers"] == "conv1 to readout fp16"
    assert shown["int8 parameters"] == shown["fp32 parameters"]
    assert shown["fp32 MACs an image"] < shown["fp32 MACs an image, every product at every step"]
    with FiringRates(precise) as firing:
        _, rates = firing(precise.golden()[0])
    assert f"conv1 {rates[:, 0].mean():.3f}, conv2" in shown["fp32 firing rates, golden inputs"]
    for name in ("flips.png", "density.png"):
        with Image.open(tmp_path / "plots" / name) as picture:
            assert min(picture.size) > 300
            image = np.asarray(picture.convert("RGB")).astype(int)
        assert len(np.unique(image @ [1 << 16, 1 << 8, 1])) > 50  # colours
    text = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert text.exit_code == 0, text.output
    rate = f" {100 * expected[2].mean('rate', 'conv3'):.3f} "
    (row,) = (line for line in text.stdout.splitlines() if "conv3" in line and rate in line)
    assert " fp8 " in row
    assert f"{expected[1].labels_changed} of 30 labels changed" in text.stdout


def test_what_cannot_be_compared_is_one_line(
    precise: Bundle, bundle: Bundle, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*arguments: object) -> str:
        done = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
        assert done.exit_code == 2, done.output
        return done.stderr

    assert "has only one precision" in error(bundle.path, "--flips")
    assert "is not one" in error(run_dir, "--flips")
    unnamed = onnx.load(bundle.variant("fp32"))
    for node in unnamed.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("spikes/", "s/") for name in names]
    with pytest.raises(InputError, match="does not name its membrane potentials"):
        Recorder(unnamed)

    def no_data(config: object) -> None:
        raise MissingData("digits are not here")

    monkeypatch.setattr("mpdsgr_deploy.diagnostics.spike_flips.load_test", no_data)
    where, found = flips_of(precise)
    assert where == f"{found[0].n} golden inputs (digits are not here)"
    assert found[0].n == len(precise.golden()[0])
    assert "digits are not here" in error(precise.path, "--flips", "--root", tmp_path)


def test_spans_of_layers_read_like_a_sentence() -> None:
    layers = dict.fromkeys(["conv1", "conv2"], "fp32") | {"fc1": "int8", "fc2": "fp32"}
    assert spans(layers) == "conv1 to conv2 fp32, fc1 int8, fc2 fp32"
