"""The bundles that come with the package, and bundles without the data set's images."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import QUICK_GATE, mpdsgr_here

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.reference import IMAGES
from mpdsgr_deploy.runtime import open_predictor

SHIPPED = sorted(path.name for path in shipped("export").glob("bundles/*/"))


def test_they_are_listed_with_what_they_promise() -> None:
    done = CliRunner().invoke(main, ["bundles", "--json"])
    found = json.loads(done.output)
    assert sorted(found) == SHIPPED == ["cifar10", "cifar10-clean", "digits"]
    for name, manifest in found.items():
        assert manifest["recipe"]["data"]["name"] == name.split("-")[0]
        promise = manifest["reference"]
        shown = CliRunner().invoke(main, ["bundles"]).output
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{name} "))
        for condition in ("clean", "worst"):
            assert f"{100 * promise['correct'][condition] / promise['n']:.1f}" in line.split()


@pytest.mark.parametrize("name", SHIPPED)
def test_they_are_whole_small_and_answer(name: str) -> None:
    folder = shipped("export") / "bundles" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    bundle = open_bundle(folder)
    for precision in bundle.manifest.variants:
        with open_predictor(bundle, precision=precision) as predictor:  # checks its golden batch
            assert predictor(np.zeros((2, *bundle.manifest.input_shape), np.float32)).shape == (2, 10)
    assert (IMAGES in bundle.manifest.files) == (name == "digits")  # CIFAR-10 is not ours to hand on


@pytest.mark.usefixtures("real_tiers")
def test_a_copy_is_validated_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["bundles", "--copy", "digits"])
    assert done.exit_code == 0
    assert "mpdsgr validate digits --report digits-report" in done.output
    Path("gate.toml").write_text(QUICK_GATE)
    options = ("--precision", "int8", "--tier", "commit", "--gate", "gate.toml", "--no-rebuild")
    validated = mpdsgr_here("validate", "digits", *options, "--report", "digits-report")
    assert validated.returncode == 0, validated.stdout
    bare = CliRunner().invoke(main, ["bundles", "--copy", "cifar10-clean"])
    assert "--root DIR (where cifar10 lies)" in bare.output
    again = CliRunner().invoke(main, ["bundles", "--copy", "digits"])
    assert again.exit_code == 2
    assert "digits already exists in this directory" in again.output
    unknown = CliRunner().invoke(main, ["bundles", "--copy", "digitz"])
    assert unknown.exit_code == 2
    assert "digits" in unknown.output


def test_a_bundle_without_images_holds_none(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "bare", precisions=["int8"], carry_images=False)
    bundle = open_bundle(tmp_path / "bare")
    assert IMAGES not in bundle.manifest.files
    images = load_test(bundle.manifest.recipe.data).unit()
    for precision in bundle.manifest.variants:
        inputs, _ = bundle.golden(precision)
        nearest = min(float(abs(images - golden).max(axis=(1, 2, 3)).min()) for golden in inputs)
        assert nearest > 0.1
        with open_predictor(bundle, precision=precision):
            pass
    assert bundle.manifest.reference is not None  # of the images that are not there
