"""Tables and the command that measures them: a page shows what was measured, nothing else."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import mpdsgr
from exporting_once import to_graph

from mpdsgr_deploy.attacks.tiers import TIERS, suite_of
from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.cli.table import command
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments import flip_measurement, flip_records, flips_page, table_page
from mpdsgr_deploy.experiments.record_files import RECORDS, put_record, read_records
from mpdsgr_deploy.experiments.records import Record, Start, load_measured, outdated, records_of
from mpdsgr_deploy.experiments.row_comparison import difference
from mpdsgr_deploy.experiments.table import built_in_tables, load_table
from mpdsgr_deploy.trained_networks import load_network
from mpdsgr_deploy.validation.proportions import wilson

SMALL = """
title = "A table of the tests"
seeds = [0, 1]
limit = 40
eps = ["5/255"]
set = [
    "model.width=0.125", "encoding.T=2", "training.epochs=1", "training.pictures=0",
    "attack.strong_steps=2", "defence.mpd-sgr.eta=0.25",
]

[[rows]]
recipe = "digits-reg"

[[rows]]
recipe = "digits-mpdsgr"
name = "empirical"
set = ["defence.mpd-sgr.estimator=empirical"]
"""
TOO_LARGE = 'recipe = "digits-reg"\nname = "too-large"\nset = ["training.batch_size=5000"]'


def table(file: Path, *options: object) -> Result:
    """The command in this process, on a table file; everything it writes lies beside that file."""
    runs = [] if "--render-only" in options else ["--runs", file.parent / "runs"]
    places = (*runs, "--out", file.parent / "results")
    return CliRunner().invoke(command, [str(a) for a in (file, *options, *places)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small table, measured by the command."""
    file = tmp_path_factory.mktemp("measured") / "small.toml"
    file.write_text(SMALL)
    done = table(file)
    assert done.exit_code == 0, done.output
    return file


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def test_a_table_is_measured_and_its_page_has_the_means_of_the_records(measured: Path) -> None:
    folder = measured.parent / "results" / "small"
    records = records_of(folder)
    assert list(records) == [(row, seed) for row in ("digits-reg", "empirical") for seed in (0, 1)]
    record = records["empirical", 1]
    settings = record.recipe.defence["mpd-sgr"]
    assert (settings["estimator"], settings["eta"], record.recipe.training.seed) == ("empirical", 0.25, 1)
    assert (record.attacked.n, record.checkpoint, record.suite) == (40, "last", suite_of(None))
    assert record.test_set is not None
    trained, network = load_network(next(measured.parent.glob("runs/small/empirical-seed1-*/last")))
    test = load_test(trained.recipe.data)
    with torch.no_grad():
        right = network(torch.from_numpy(test.unit())).argmax(1) == torch.from_numpy(test.classes)
    assert (record.test_set.n, record.test_set.correct) == (497, int(right.sum()))
    clean = [records["digits-reg", seed].attacked.accuracy("clean") for seed in (0, 1)]
    mean, deviation = sum(clean) / 2, abs(clean[0] - clean[1]) / 2**0.5
    low, high = wilson(40 * mean, 40)
    expected = f"{100 * mean:.1f} ± {100 * deviation:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert f"| digits-reg | REG | 0, 1 | 40 | {expected} |" in (folder / table_page.PAGE).read_text()


def test_only_what_changed_is_measured_again(measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(measured.parent, tmp_path, dirs_exist_ok=True)
    file, folder = tmp_path / "small.toml", tmp_path / "results" / "small"
    before = (folder / RECORDS).read_text().splitlines()
    file.write_text(SMALL.replace('["defence.mpd-sgr.est', '["attack.eps=0.05", "defence.mpd-sgr.est'))
    assert table(file, "--seeds", "0").exit_code == 0
    assert "empirical, seed 0, was measured with another recipe (other values in attack)" in caplog.text
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 4  # attacked again, not trained again
    after = (folder / RECORDS).read_text().splitlines()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True]
    assert "eps 0.05" in after[2]

    file.write_text(SMALL.replace("limit = 40", "limit = 30"))  # every record is of another recipe
    assert table(file, "--render-only").exit_code == 0
    text = (folder / table_page.PAGE).read_text()
    assert "Not measured: digits-reg, empirical." in text
    assert "±" not in text


def test_processes_that_write_at_once_lose_nothing(measured: Path, tmp_path: Path) -> None:
    record = next(iter(records_of(measured.parent / "results" / "small").values()))
    many = [record.model_copy(update={"seed": seed}) for seed in [*range(20), *range(10)]]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda own: put_record(tmp_path / RECORDS, own, ("row", "seed")), many))
    assert [own.seed for own in read_records(tmp_path / RECORDS, Record)] == list(range(20))
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS]
    text = (tmp_path / RECORDS).read_text()
    for broken, expected in (
        (text[:-20], r"line 20 is damaged \(not JSON\); remove the line"),
        ("{}\n" + text, "line 1 has no valid schema_version; remove the line"),
        (text.replace('"schema_version":2', '"schema_version":"2"', 1), "line 1 has no valid schema_version"),
        ("3\n" + text, "line 1 has no valid schema_version"),
        (text.replace('"schema_version":2', '"schema_version":3', 1), "line 1 has schema version 3"),
    ):
        (tmp_path / RECORDS).write_text(broken)
        with pytest.raises(InputError, match=expected):
            read_records(tmp_path / RECORDS, Record)


def test_numbers_are_rounded_where_they_were_measured_and_nowhere_else(measured: Path) -> None:
    record = next(iter(records_of(measured.parent / "results" / "small").values()))
    exact = record.model_copy(update={"curve": {"loss": [1 / 3]}, "layers": [{"omega_empirical": 2 / 3}]})
    values = json.loads(exact.model_dump_json())
    assert (values["curve"], values["layers"]) == ({"loss": [0.333333]}, [{"omega_empirical": 0.666667}])
    eps = record.recipe.model_copy(update={"attack": record.recipe.attack.model_copy(update={"eps": 8 / 255})})
    again = Record.model_validate_json(record.model_copy(update={"recipe": eps}).model_dump_json())
    assert again.recipe.attack.eps == 8 / 255


def test_records_of_an_earlier_attack_suite_are_measured_again(measured: Path) -> None:
    spec = load_table(str(measured))[1]
    rows = load_measured(spec, measured.parent / "results" / "small")
    assert f"Union: measured with suite {spec.suite}." in table_page.render("small", spec, rows)
    record = rows["empirical"][0]
    assert outdated(record, spec) is None
    earlier = record.model_copy(update={"suite": spec.suite - 1})
    assert f"was measured with attack suite {spec.suite - 1}, and the current one is" in str(outdated(earlier, spec))


def test_a_stronger_tier_leaves_the_records_of_other_tiers_valid(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_table(str(measured))[1]
    (record, *_) = records_of(measured.parent / "results" / "small").values()
    tiers = {tier: spec.model_copy(update={"tier": tier}) for tier in ("commit", "release")}
    records = {tier: record.model_copy(update={"tier": tier, "suite": own.suite}) for tier, own in tiers.items()}
    assert [outdated(records[tier], own) for tier, own in tiers.items()] == [None, None]
    monkeypatch.setitem(TIERS, "release", replace(TIERS["release"], suite=TIERS["release"].suite + 1))
    assert outdated(records["commit"], tiers["commit"]) is None
    assert f"and the current one is {TIERS['release'].suite}" in str(outdated(records["release"], tiers["release"]))


def test_mistakes_are_one_line(small: Path) -> None:
    for options, expected in (
        ([small, "digits-rag"], "unknown row 'digits-rag'; allowed: digits-reg, empirical; did you mean 'digits-reg'?"),
        ([small, "--seeds", "0;1"], "--seeds '0;1'"),
        (["cifar11"], f"unknown table 'cifar11'; allowed: {', '.join(sorted(built_in_tables()))}"),
    ):
        with pytest.raises(InputError) as error:
            CliRunner().invoke(command, [str(option) for option in options], catch_exceptions=False)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
    for broken, expected in (
        (SMALL.replace("defence.mpd-sgr.eta", "defence.rat.b"), "changes a defence that no row has"),
        (SMALL + '[[rows]]\nrecipe = "digits-reg"\n', "digits-reg appear twice"),
        (SMALL + 'init = "empirical"\n', "empirical would start from weights that depend on its own"),
        (SMALL.replace('"empirical"', '"../empirical"'), "name"),
        (SMALL.replace("limit", "limits"), "unknown key 'limits'"),
        (SMALL.replace("[0, 1]", "[]"), "seeds"),
        (SMALL.replace('"digits-reg"', '"digits-rag"'), "unknown recipe 'digits-rag'"),
    ):
        small.write_text(broken)
        with pytest.raises(InputError, match=expected):
            load_table(str(small))


def test_one_failed_run_of_two_processes_does_not_stop_the_other(small: Path) -> None:
    small.write_text(SMALL.replace('recipe = "digits-reg"', TOO_LARGE))
    places = ("--runs", small.parent / "runs", "--out", small.parent / "results")
    done = mpdsgr("table", small, "--seeds", "0", "--jobs", 2, *places)
    assert done.returncode == 2
    assert "error: too-large, seed 0: training.batch_size is 5000" in done.stderr
    assert "2 of 2" in done.stderr
    text = (small.parent / "results" / "small" / table_page.PAGE).read_text()
    assert "| empirical | MPD-SGR | 0 | 40 |" in text
    assert "Not measured: too-large; seed 1 of empirical." in text


def test_a_run_that_another_keeps_from_being_measured_is_said(small: Path) -> None:
    attacked = 'name = "empirical"\ntransfer = "too-large"'
    small.write_text(SMALL.replace('recipe = "digits-reg"', TOO_LARGE).replace('name = "empirical"', attacked))
    done = table(small)
    assert done.exit_code == 2
    for seed, other in ((0, 1), (1, 0)):
        reason = f"it was not measured, because too-large, seed {other}, which it needs, failed"
        assert f"error: empirical, seed {seed}: {reason}" in done.output
        assert done.output.count(f"error: too-large, seed {seed}: ") == 1


def test_a_row_starts_from_the_network_of_another(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured.parent, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "small.toml"
    file.write_text(SMALL + '[[rows]]\nrecipe = "digits-reg"\nname = "tuned"\ninit = "digits-reg"\n')
    done = table(file, "tuned", "--seeds", "1")
    assert done.exit_code == 0, done.output
    records = records_of(tmp_path / "results" / "small")
    record, earlier = records["tuned", 1], records["digits-reg", 1]
    (start,) = (tmp_path / "runs" / "small").glob("digits-reg-seed1-*")
    sha256 = load_checkpoint(start / "last").weights_sha256
    assert record.init == Start(row="digits-reg", seed=1, epoch=1, weights_sha256=sha256, seconds=earlier.seconds)
    spec = load_table(str(file))[1]
    assert outdated(record, spec) is None
    for other in (
        None,
        record.init.model_copy(update={"row": "empirical"}),
        record.init.model_copy(update={"seed": 0}),
    ):
        assert "from other weights" in str(outdated(record.model_copy(update={"init": other}), spec))
    file.write_text(file.read_text() + '[[rows]]\nrecipe = "digits-reg"\nname = "again"\ninit = "tuned"\n')
    assert table(file, "again", "--seeds", "1").exit_code == 0
    (tuned,) = (tmp_path / "runs" / "small").glob("tuned-seed1-*")
    again = records_of(tmp_path / "results" / "small")["again", 1]
    assert again.init.weights_sha256 == load_checkpoint(tuned / "last").weights_sha256
    assert again.seconds_before == pytest.approx(earlier.seconds + record.seconds)


def test_a_record_of_other_attacks_is_outdated(measured: Path) -> None:
    spec = load_table(str(measured))[1]
    record = records_of(measured.parent / "results" / "small")["empirical", 0]
    assert outdated(record, spec) is None
    assert "another recipe" in outdated(record.model_copy(update={"seed": 1}), spec)
    assert "attack suite 4, and the current one is 3" in outdated(record, spec.model_copy(update={"tier": "commit"}))
    assert "under all attacks" in outdated(record, spec.model_copy(update={"eps": (0.01,)}))


def test_fine_tuning_is_compared_with_that_without_a_defence_from_the_same_weights(measured: Path) -> None:
    spec = load_table(str(measured))[1]
    rows = load_measured(spec, measured.parent / "results" / "small")
    assert "in fine-tuning" not in table_page.render("small", spec, rows)
    start = Start(row="earlier", seed=0, epoch=1, weights_sha256="ab", seconds=0)
    for records in rows.values():
        records[:] = [record.model_copy(update={"init": start}) for record in records]
    page = table_page.render("small", spec, rows)
    pgd = difference(rows["empirical"], rows["digits-reg"], "pgd 5/255")
    assert "| row | clean | gaussian | FGSM | PGD | strong | PGD 5/255 | union |" in page
    assert str(pgd) in page
    rows["digits-reg"] = [record.model_copy(update={"init": None}) for record in rows["digits-reg"]]
    assert "in fine-tuning" not in table_page.render("small", spec, rows)


def test_flips_are_counted_in_every_variant_of_a_trained_row(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flip_measurement, "to_graph", to_graph)
    done = table(measured, "digits-reg", "--seeds", "1", "--flips", "--images", "20")
    assert done.exit_code == 0, done.output
    folder = measured.parent / "results" / "flips"
    (record,) = flips_page.every(flip_records.load(folder))
    assert (record.table, record.row, record.seed, record.n) == ("small", "digits-reg", 1, 20)
    assert len(record.variants) == 6 + 4
    first = {name: variant.layers["conv1"].rate for name, variant in record.variants.items()}
    assert first["int8, neurons fp32"] == 0 < first["first product int8"]  # its default leaves the first layer alone
    assert record.variants["last product int8"].layers == record.variants["int8, neurons fp32"].layers
    assert record.variants["last product int8"].logits_moved != record.variants["int8, neurons fp32"].logits_moved
    assert "| small | digits-reg | REG | 1 | 20 |" in (folder / flips_page.PAGE).read_text()
    for variant in record.variants.values():
        variant.layers = {name: layer.model_copy(update={"fresh": 0.0}) for name, layer in variant.layers.items()}
    assert flips_page.plot({("small", "digits-reg"): [record]})[:4] == b"\x89PNG"  # without a flip
