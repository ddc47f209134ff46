"""`mpdsgr inspect A B`: what differs, on hand-made verdicts and networks that share images, and what is left out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import assert_input_error, mpdsgr_here
from PIL import Image
from test_leaderboard import report

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.diagnostics.distribution import measure
from mpdsgr_deploy.diagnostics.trace import Recording
from mpdsgr_deploy.pairs.differences import Differences, compare
from mpdsgr_deploy.pairs.network_pair import paired_networks
from mpdsgr_deploy.pairs.side import read_side
from mpdsgr_deploy.reference import images_sha256
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.validation.image_checks import evaluation_images
from mpdsgr_deploy.validation.proportions import mcnemar
from mpdsgr_deploy.validation.rows import Row

SHIPPED = Path(__file__).parent.parent / "export" / "bundles"
DIGITS, CIFAR = SHIPPED / "digits", SHIPPED / "cifar10"


def compared(a: Path | str, b: Path | str, images: int = 16) -> Differences:
    return compare(read_side(str(a)), read_side(str(b)), images=images)


def test_a_run_and_its_bundle_fire_alike(run_dir: Path, precise: Bundle) -> None:
    same = compared(run_dir, precise.path)
    assert set(same.settings) == {"precision", "parameters", "multiply-accumulates"}
    assert [layer.layer for layer in same.layers] == ["conv1", "conv2", "conv3"]
    for layer in same.layers:
        assert layer.spikes_differ == pytest.approx(0, abs=1e-3)
        assert layer.overlap == pytest.approx(1, abs=1e-3)
        assert layer.firing_rate[0] == pytest.approx(layer.firing_rate[1], abs=1e-3)
    assert "holds no results of attacks" in same.left_out["recorded verdicts"]
    (clean,) = same.verdicts
    assert (clean.condition, clean.n) == ("clean", 16)
    rounded = compared(run_dir, f"{precise.path}@int8")
    assert rounded.settings["precision"] == (None, "int8")
    assert 0 < max(layer.spikes_differ or 0 for layer in rounded.layers) < 0.2


def test_rates_and_windows_are_those_of_the_torch_measurement(run_dir: Path, bundle: Bundle) -> None:
    checkpoint, model = load_network(run_dir / "last")
    x = torch.from_numpy(load_test(checkpoint.recipe.data)[:16].unit())
    expected = [layer.statistics() for layer in measure(model, x, batch_size=16)]
    for layer, statistics in zip(compared(run_dir, bundle.path).layers, expected, strict=True):
        assert layer.firing_rate == pytest.approx((statistics.firing_rate,) * 2, abs=1e-4)
        assert layer.in_window == pytest.approx((statistics.in_window,) * 2, abs=1e-4)


def test_differing_spikes_are_counted_and_other_steps_are_not_compared(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two networks of one layer of four neurons that disagree in one neuron in one of two steps."""
    u = np.array([[2.0, 2.0, 0.0, 0.5]], np.float32)
    fired = np.array([[1, 1, 0, 0]], np.float32)
    silent = np.array([[1, 0, 0, 0]], np.float32)
    logits = np.eye(10, dtype=np.float32)[:1]
    two = Recording(logits, {"a/0": u, "a/1": u}, {"a/0": fired, "a/1": fired})
    other = Recording(logits, {"a/0": u, "a/1": u - 1}, {"a/0": fired, "a/1": silent})
    one = Recording(logits, {"a/0": u}, {"a/0": fired})
    for second, differ, rate in ((other, 1 / 8, 3 / 8), (one, None, 1 / 2)):
        networks = iter([lambda _: two, lambda _, second=second: second])
        monkeypatch.setattr("mpdsgr_deploy.pairs.network_pair.open_network", lambda _, made=networks: next(made))
        side = read_side(str(bundle.path))
        (layer,) = paired_networks(side, side, images=1).layers
        assert layer.spikes_differ == differ
        assert layer.firing_rate == (1 / 2, rate)
        assert layer.in_window[0] == 1 / 4  # the triangle of half-width 1 around the threshold 1, its ends outside


def test_curves_of_two_checkpoints_and_their_pictures(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots"
    words = ["inspect", str(run_dir), str(run_dir / "best"), "--images", "8", "--plots", str(out)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert f"membranes.png and curves.png in {out}" in done.output
    for name in ("membranes.png", "curves.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    tables = [
        line for line in done.output.splitlines() if not line.startswith(("A: ", "B: ", "not compared: ", "membranes"))
    ]
    assert len(tables) > 15
    assert max(map(len, tables)) <= 80
    again = CliRunner().invoke(main, [*words, "--json"])
    shown = json.loads(again.stdout)
    assert len(shown["curves"]["loss"][0]) == 3
    assert {"firing_rate", "overlap", "spikes_differ", "in_window", "layer"} == set(shown["layers"][0])


def test_reports_on_the_same_images_are_paired(tmp_path: Path) -> None:
    files = [report(tmp_path, "REG", clean=39, worst=10), report(tmp_path, "AT", clean=38, worst=30)]
    verdicts = {pair.condition: pair for pair in compared(*files).verdicts}
    assert list(verdicts) == ["clean", "pgd", "worst of these"]
    assert verdicts["pgd"].right == (15, 35)
    flips = verdicts["worst of these"].flips
    assert (flips.newly_wrong, flips.newly_right) == (0, 20)  # the 5 that both keep under pgd alone are right here too
    assert flips.p_value == mcnemar(0, 20)


def rows(attack: str, eps: float) -> list[Row]:
    """Nine of forty images are right under one attack, clean and in the worst case."""
    return [Row.of(name, "", np.arange(40) < 9, eps=eps) for name in ("clean", attack, "worst")]


def test_tiers_have_versions_of_their_own_and_are_paired_by_settings(tmp_path: Path) -> None:
    release = {"tier": "release", "suite": 2}
    differences = compared(report(tmp_path, "REG", 39, 10), report(tmp_path, "AT", 38, 30, **release))
    assert "pgd" in [pair.condition for pair in differences.verdicts]


@pytest.mark.parametrize(
    ("fields", "part", "reason"),
    [
        (
            {"images_sha256": "1" * 64},
            "recorded verdicts",
            "the two used different images: the first 40 test",
        ),
        ({"suite": 2}, "attacks", "attack suite 1 and 2"),
        (
            {"rows": [Row.of(n, "", np.arange(40) < 9, eps=0.2) for n in ("clean", "pgd", "worst")]},
            "attacks",
            "eps 0.1",
        ),
        (
            {"rows": [Row.of(n, "", np.arange(40) < 9, eps=0.1) for n in ("clean", "bim", "worst")]},
            "attacks",
            "bim, pgd",
        ),
    ],
)
def test_what_cannot_be_paired_is_left_out_with_the_reason(
    fields: dict[str, object], part: str, reason: str, tmp_path: Path
) -> None:
    differences = compared(report(tmp_path, "REG", 39, 10), report(tmp_path, "AT", 38, 30, **fields))
    assert differences.left_out[part].startswith(reason)
    names = [pair.condition for pair in differences.verdicts]
    assert names == ([] if part == "recorded verdicts" else ["clean"])


def test_a_report_is_paired_with_what_the_bundle_recorded_on_its_images(tmp_path: Path) -> None:
    """A condition of the bundle that the report met with other settings is left out of the worst case."""
    bundle = read_side(str(DIGITS)).bundle
    assert bundle is not None
    reference, images = bundle.reference(), evaluation_images(bundle, None, None)
    assert reference is not None
    sha = images_sha256(images[:40])
    pgd = reference.settings["pgd"].replace("triangle:1", "sigmoid:4")  # another network's own surrogate
    lost = reference.verdicts["pgd"][:40] & (np.arange(40) > 0)
    made = [Row.of("clean", "", np.ones(40, bool)), Row.of("pgd", pgd, lost, eps=0.1)]
    made += [Row.of("square", "2 queries", np.ones(40, bool), eps=0.1), Row.of("worst", "", lost, eps=0.1)]
    file = report(tmp_path, "AT", 39, 10, images_sha256=sha, rows=made)
    differences = compared(DIGITS, file)
    pairs = {pair.condition: pair for pair in differences.verdicts}
    assert list(pairs) == ["clean", "pgd", "worst of these"]
    assert (pairs["pgd"].flips.newly_wrong, pairs["pgd"].flips.newly_right) == (1, 0)
    assert "square" in differences.left_out["attacks"]
    assert "holds no network" in differences.left_out["spikes, membranes"]


def test_bundles_of_other_images_share_settings_alone() -> None:
    differences = compared(DIGITS, CIFAR)
    assert differences.settings["data.name"] == ("digits", "cifar10")
    assert differences.left_out["spikes, membranes"] == "the two are for different images: data digits, and cifar10"
    assert differences.left_out["recorded verdicts"].endswith("were measured on different images")
    assert differences.layers == differences.verdicts == []


def test_without_the_data_set_golden_inputs_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no `data` lies
    differences = compared(CIFAR, f"{CIFAR}@int8")
    assert differences.measured_on == "8 golden inputs; give --root to use test images"
    assert differences.layers[0].spikes_differ == 0  # the first layer is float32 in both
    assert 0 < (differences.layers[-1].spikes_differ or 0) < 0.1
    assert differences.verdicts == []  # golden inputs have no labels


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((DIGITS, "nothing"), ["nothing is not a training run, checkpoint, bundle or report"]),
        ((DIGITS, f"{DIGITS}@fp4"), ["fp4", "fp32, int8"]),
    ],
)
def test_what_cannot_be_read_is_one_line(words: tuple[object, ...], parts: list[str]) -> None:
    assert_input_error(mpdsgr_here("inspect", *words), *parts)
