"""Tables, the script that reproduces them, and the committed results: a page shows what was measured, nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.diagnostics.trace import Recorder
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting import precision
from mpdsgr_deploy.networks import load_model
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe
from mpdsgr_deploy.validation.statistics import mcnemar, wilson

TRAIN = Path(__file__).parent.parent / "train"
sys.path.insert(0, str(TRAIN))

import flips  # noqa: E402
import flips_page  # noqa: E402
import page  # noqa: E402
import reproduce  # noqa: E402
import result  # noqa: E402
import sensitivity  # noqa: E402
import table  # noqa: E402

TABLES = sorted(path.stem for path in table.TABLES.glob("*.toml"))
MEASURED = sorted(
    path.name
    for path in reproduce.RESULTS.iterdir()
    if path.is_dir() and path != flips_page.RESULTS and not path.name.startswith("study-")
)

IMAGES = {  # shape and number of classes
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny-imagenet": ((3, 64, 64), 200),
}
SMALL = """
title = "A table of the tests"
seeds = [0, 1]
limit = 40
set = ["model.width=0.125", "encoding.T=2", "training.epochs=1", "attack.strong_steps=2", "defence.mpd-sgr.eta=0.25"]

[[rows]]
recipe = "digits-reg"

[[rows]]
recipe = "digits-mpdsgr"
name = "empirical"
set = ["defence.mpd-sgr.estimator=empirical"]
"""


def arguments(file: Path, *options: object) -> list[str]:
    """For the script, on a table file; everything it writes lies beside that file."""
    return [str(a) for a in (file, *options, "--runs", file.parent / "runs", "--out", file.parent / "results")]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reproduce, "show_progress", lambda: None)  # pytest has the log
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_of_a_table_exist_and_are_what_they_say(name: str) -> None:
    found = table.load_table(name)[1]
    for row in found.rows:
        recipe = load_recipe(find_recipe(row.recipe), found.overrides(row))
        assert recipe.defence.keys() == load_recipe(find_recipe(row.recipe)).defence.keys()  # none added, none lost
        resolved = found.recipe(row, seed=7)
        assert resolved.training.seed == 7
        with torch.device("meta"):
            model, defences = build_defended(resolved, *IMAGES[resolved.data.name])
        assert len(model.layers()) > 0
        assert len(defences) == len(resolved.defence)
    defended = [tuple(sorted(load_recipe(find_recipe(row.recipe)).defence)) for row in found.rows]
    if name in ("digits", "cifar10-small"):
        vanilla = [(), ("rat",), ("sr",), ("stog",), ("dlif",), ("feel",), ("mpd-sgr",)]
        assert defended == [*vanilla, *(tuple(sorted(("at", *names))) for names in vanilla)]


@pytest.mark.parametrize("name", MEASURED)
def test_a_committed_page_is_what_its_files_give(name: str) -> None:
    found = table.load_table(name)[1]
    folder = reproduce.RESULTS / name
    measured = page.load_results(found, folder)
    assert sum(map(len, measured.values())) == len(list(folder.glob("*.json"))) > 0  # no file is left out
    assert (folder / page.PAGE).read_text() == page.render(name, found, measured)
    readme = (TRAIN / "README.md").read_text()
    assert page.quote(name, measured, readme) == readme
    pictures = page.pictures(found, measured)
    assert pictures == page.pictures(found, measured)
    for picture in pictures:
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
        assert f"]({picture})" in (folder / page.PAGE).read_text()
    for results in measured.values():
        for got in results:
            assert result.result_path(folder, got.row, got.seed).exists()
            assert got.table == name
            assert got.recipe.data.root == "data"
            for origin in (got.provenance, got.evaluation.provenance):
                assert origin["hardware"]["cpu"]
                assert origin["packages"]["torch"]
            assert all(row.n == got.evaluation.rows[0].n > 0 for row in got.evaluation.rows)
            assert got.seconds == pytest.approx(sum(entry["seconds"] for entry in got.curve), abs=0.06)


def test_the_findings_of_the_small_tables_quote_their_pages() -> None:
    pages = "".join((folder / page.PAGE).read_text() for folder in reproduce.RESULTS.iterdir() if folder.is_dir())
    figures = re.findall(r"(?<![\w:.])\d+\.\d+(?![\w.])", (reproduce.RESULTS / "FINDINGS.md").read_text())
    assert len(figures) > 40
    settings = {"0.1", "0.5", "0.35"}  # of eta and of the target, which the pages write into names
    assert [figure for figure in figures if figure not in pages and figure not in settings] == []


def test_the_findings_of_exported_networks_quote_their_page() -> None:
    folder = reproduce.RESULTS / "cifar10-cpu"
    shown = (folder / page.PAGE).read_text()
    figures = re.findall(r"(?<![\w:.])[-+]?\d+\.\d+(?![\w.])", (folder / "FINDINGS.md").read_text())
    assert len(figures) > 30
    assert [figure for figure in figures if figure not in shown] == []


def test_the_findings_quote_the_paired_verdicts() -> None:
    measured = page.load_results(table.load_table("cifar10-quarter")[1], reproduce.RESULTS / "cifar10-quarter")

    def verdicts(row: str) -> np.ndarray:
        (got,) = measured[f"cifar10-vgg11-quarter-{row}"]
        (fgsm,) = (r for r in got.evaluation.rows if r.name == "fgsm")
        return fgsm.score.verdicts(fgsm.n)

    reg, theorem = verdicts("reg"), verdicts("mpdsgr-theorem")
    worse, better = int((reg & ~theorem).sum()), int((~reg & theorem).sum())
    text = " ".join((reproduce.RESULTS / "cifar10-quarter" / "FINDINGS.md").read_text().split())
    assert f"theorem breaks {worse} images that REG survives and survives {better} that REG loses" in text
    assert f"(p = {mcnemar(worse, better):.3f})" in text


def test_reproduce_measures_resumes_and_renders(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, str(TRAIN / "reproduce.py"), *arguments(small, "--jobs", 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4" in done.stderr
    folder = small.parent / "results" / "small"
    files = sorted(folder.glob("*.json"))
    assert [f.stem for f in files] == [f"{row}-seed{seed}" for row in ("digits-reg", "empirical") for seed in (0, 1)]
    written = {f: f.read_bytes() for f in files}
    got = json.loads(written[folder / "empirical-seed1.json"])
    settings = got["recipe"]["defence"]["mpd-sgr"]
    assert (settings["estimator"], settings["eta"], got["recipe"]["training"]["seed"]) == ("empirical", 0.25, 1)
    assert {row["n"] for row in got["evaluation"]["rows"]} == {40}

    # the page's figures are the means of the files'
    clean = []
    for seed in (0, 1):
        rows = json.loads(written[folder / f"digits-reg-seed{seed}.json"])["evaluation"]["rows"]
        clean += [row["score"]["accuracy"] for row in rows if row["name"] == "clean"]
    mean, deviation = sum(clean) / 2, abs(clean[0] - clean[1]) / 2**0.5
    low, high = wilson(40 * mean, 40)
    expected = f"{100 * mean:.1f} ± {100 * deviation:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert f"| digits-reg | REG | 0, 1 | 40 | {expected} |" in (folder / page.PAGE).read_text()

    # another attack: measured again, not trained again; what is still right is kept
    small.write_text(SMALL.replace('["defence.mpd-sgr.est', '["attack.eps=0.05", "defence.mpd-sgr.est'))
    assert CliRunner().invoke(reproduce.main, arguments(small)).exit_code == 0
    assert "empirical-seed0.json was measured with another recipe (other values in attack)" in caplog.text
    assert len(list((small.parent / "runs" / "small").iterdir())) == 4
    for file, before in written.items():
        assert (file.read_bytes() == before) == file.name.startswith("digits-reg")
    assert "eps 0.05" in (folder / "empirical-seed0.json").read_text()

    # a row whose results are of another recipe is not shown
    small.write_text(SMALL.replace("limit = 40", "limit = 30"))
    assert CliRunner().invoke(reproduce.main, arguments(small, "--render-only")).exit_code == 0
    text = (folder / page.PAGE).read_text()
    assert "Not measured: digits-reg, empirical." in text
    assert "±" not in text


def test_mistakes_are_one_line(small: Path) -> None:
    for options, expected in (
        ([small, "digits-rag"], "unknown row 'digits-rag'; allowed: digits-reg, empirical; did you mean 'digits-reg'?"),
        ([small, "--seeds", "0;1"], "--seeds '0;1'"),
        (["cifar11"], f"unknown table 'cifar11'; allowed: {', '.join(TABLES)}"),
    ):
        done = CliRunner().invoke(reproduce.main, [str(option) for option in options])
        assert done.exit_code == 2
        assert expected in done.output
        assert done.output.count("\n") == 1
    for broken, expected in (
        (SMALL.replace("defence.mpd-sgr.eta", "defence.rat.b"), "no row has the defence"),
        (SMALL + '[[rows]]\nrecipe = "digits-reg"\n', "digits-reg appear twice"),
        (SMALL.replace('"empirical"', '"../empirical"'), "name"),
        (SMALL.replace("limit", "limits"), "unknown key 'limits'"),
        (SMALL.replace("[0, 1]", "[]"), "seeds"),
        (SMALL.replace('"digits-reg"', '"digits-rag"'), "unknown recipe 'digits-rag'"),
    ):
        small.write_text(broken)
        with pytest.raises(InputError, match=expected):
            table.load_table(str(small))


def test_one_failed_run_does_not_stop_the_others(small: Path) -> None:
    large = 'recipe = "digits-reg"\nname = "too-large"\nset = ["training.batch_size=5000"]'
    small.write_text(SMALL.replace('recipe = "digits-reg"', large))
    done = CliRunner().invoke(reproduce.main, arguments(small, "--seeds", "0"))
    assert done.exit_code == 2
    assert "error: too-large, seed 0: training.batch_size is 5000" in done.output
    text = (small.parent / "results" / "small" / page.PAGE).read_text()
    assert "| empirical | MPD-SGR | 0 | 40 |" in text
    assert "Not measured: too-large." in text


def test_a_run_that_another_keeps_from_being_measured_is_said(small: Path) -> None:
    large = 'recipe = "digits-reg"\nname = "too-large"\nset = ["training.batch_size=5000"]'
    attacked = 'name = "empirical"\ntransfer = "too-large"'
    small.write_text(SMALL.replace('recipe = "digits-reg"', large).replace('name = "empirical"', attacked))
    done = CliRunner().invoke(reproduce.main, arguments(small, "empirical", "--seeds", "0"))
    assert done.exit_code == 2
    assert "error: empirical, seed 0: not measured, since too-large, seed 1 failed" in done.output


def test_sensitivity_does_not_depend_on_the_batches(run_dir: Path) -> None:
    best = find_checkpoint(run_dir)
    checkpoint = load_checkpoint(best)
    model = load_model(best / checkpoint.weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    images = load_test(checkpoint.recipe.data)[:50]
    validation = checkpoint.recipe.validation
    whole, split = (
        sensitivity.sensitivity(
            model,
            images,
            checkpoint.recipe.model_copy(update={"validation": validation.model_copy(update={"batch_size": size})}),
        )
        for size in (50, 7)
    )
    x, y = torch.from_numpy(images.unit()), torch.from_numpy(images.classes)
    with torch.no_grad():
        logits = model(x)
    right = logits.argmax(1) == y
    best_two = logits[right].topk(2).values  # of an image it gets right, the first is the true class
    assert whole["n"] == split["n"] == int(right.sum()) > 0
    assert whole["margin"] == pytest.approx((best_two[:, 0] - best_two[:, 1]).mean().item(), rel=1e-5)
    assert whole["pgd"] > whole["noise"]
    for key in ("margin", "promised", "noise", "pgd"):
        assert split[key] == pytest.approx(whole[key], rel=1e-3)
    assert split["flipped_pgd"] == pytest.approx(whole["flipped_pgd"], rel=1e-2, abs=1e-4)


def test_the_page_of_flips_is_what_its_files_give() -> None:
    rows = flips_page.load(flips_page.RESULTS)
    assert sum(map(len, rows.values())) == len(list(flips_page.RESULTS.glob("*.json"))) > 0
    text = (flips_page.RESULTS / page.PAGE).read_text()
    assert text == flips_page.render(rows)
    assert (flips_page.RESULTS / page.PLOT).read_bytes()[:4] == b"\x89PNG"
    figures = re.findall(r"(?<![\w:.])\d+\.\d+(?![\w.])", (flips_page.RESULTS / "FINDINGS.md").read_text())
    assert len(figures) > 20
    assert [figure for figure in figures if figure not in text] == []
    for found in flips_page.every(rows):
        assert found.n >= 490
        assert found.provenance["packages"]["onnxruntime"]
        assert "dirty" not in found.provenance["revision"]


def test_pairs_are_of_one_seed_and_ratios_of_it() -> None:
    def result(row: str, seed: int, scale: float) -> flips_page.FlipResult:
        layer = dict.fromkeys(flips_page.LayerFlips.model_fields, scale)
        variant = {"labels_changed": round(10 * scale), "unflipped": 0, "logits_moved": scale, "layers": {"a": layer}}
        names = [f"{precision}, neurons {n}" for precision in flips_page.PRECISIONS for n in ("fp32", "fp16")]
        return flips_page.FlipResult(
            table="t",
            row=row,
            seed=seed,
            method=row,
            network="net",
            weights_sha256="",
            data="digits",
            n=50,
            variants=dict.fromkeys([*names, *flips_page.PLACES], variant),
            provenance={},
        )

    rows = {
        ("t", "reg"): [result("reg", 0, 0.1), result("reg", 1, 0.8), result("reg", 7, 0.9)],
        ("t", "mpdsgr"): [result("mpdsgr", 0, 0.2), result("mpdsgr", 1, 0.4)],
    }
    text = flips_page.pairs(rows)
    ratio = "1.00 [0.50, 2.00]"  # 2 and 1/2
    assert f"| t | mpdsgr | int8 | {ratio} | {ratio} | {ratio} | {ratio} | 1 of 2 seeds | 9 of 100 | 6 of 100 |" in text
    assert "reg, " not in text


def test_the_script_measures_a_run_in_every_variant(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flips, "show_progress", lambda: None)  # pytest has the log
    (tmp_path / "small").mkdir()
    run = tmp_path / "small" / "reg-seed3-01234567"
    run.symlink_to(run_dir)
    arguments = [str(run), "--images", "20", "--out", str(tmp_path / "results")]
    done = CliRunner().invoke(flips.main, arguments)
    assert done.exit_code == 0, done.output
    (result,) = flips_page.every(flips_page.load(tmp_path / "results"))
    assert (result.table, result.row, result.seed, result.n) == ("small", "reg", 3, 20)
    assert len(result.variants) == 6 + 4
    first = {name: variant.layers["conv1"].rate for name, variant in result.variants.items()}
    assert first["int8, neurons fp32"] == 0 < first["first product int8"]  # its default leaves the first layer alone
    assert result.variants["last product int8"].layers == result.variants["int8, neurons fp32"].layers
    assert result.variants["last product int8"].logits_moved != result.variants["int8, neurons fp32"].logits_moved
    assert "| small | reg | REG | 3 | 20 |" in (tmp_path / "results" / page.PAGE).read_text()
    assert "is not called ROW-seedN-HASH" in CliRunner().invoke(flips.main, [str(run_dir)]).output


def test_a_product_in_int8_is_rounded_as_numpy_rounds_it(bundle: Bundle) -> None:
    network = ir.load(bundle.variant("fp32"))
    product = precision.products(network)["conv1"]
    weight, bias = (torch.from_numpy(value.const_value.numpy().copy()) for value in product.inputs[1:])
    x = load_test(bundle.manifest.recipe.data)[:5].unit()
    model = load_model(bundle.file("weights.safetensors"), bundle.manifest.recipe, (1, 8, 8), 10)
    step = 0.05
    image = torch.round(model.normalize(torch.from_numpy(x)) / step).clip(-128, 127) * step
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = torch.nn.functional.conv2d(image, torch.round(weight / scale) * scale, bias, padding=1)
    recorded = Recorder(ir.to_proto(flips.in_int8(network, "conv1", step)))(x)
    np.testing.assert_allclose(recorded.potentials["conv1/0"], expected.detach().numpy(), atol=1e-5)
