"""Tables of exported networks, measured a few minutes at a time, and how rows are compared."""

import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.cli.table import command
from mpdsgr_deploy.experiments import front, jobs, row_comparison, table_page, table_sections
from mpdsgr_deploy.experiments.records import (
    AttackedNetwork,
    Measured,
    PackedVerdicts,
    Record,
    load_measured,
    outdated,
    records_of,
)
from mpdsgr_deploy.experiments.table import ExportSpec, TableSpec, load_table
from mpdsgr_deploy.trained_networks import load_network

SMALL = """
title = "Exported networks of the tests"
limit = 20
set = ["model.width=0.125", "encoding.T=2", "training.epochs=1", "training.pictures=0", "attack.strong_steps=2"]

[artefact]
tier = "commit"
precisions = ["fp32", "int8"]
max_drop = 0.5
membranes = "mpd-sgr"

[[rows]]
recipe = "digits-reg"

[[rows]]
recipe = "digits-mpdsgr"
"""


def run(folder: Path, minutes: float) -> Result:
    """The command, for so long; what it measures it does in a process of its own."""
    places = ["--runs", folder / "runs", "--out", folder / "results", "--pack", folder / "home"]
    options = [folder / "small.toml", "--minutes", minutes, *places]
    return CliRunner().invoke(command, [str(option) for option in options])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that was measured in two pieces, the first too short for anything, the second in this process."""
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "small.toml").write_text(SMALL)
    assert run(folder, 0.02).exit_code == 0
    assert not list((folder / "results").rglob("*.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "run_limited", lambda child, seconds: CliRunner().invoke(main, child[3:]).exit_code)
        assert run(folder, 4).exit_code == 0
    return folder


def test_a_command_that_ends_in_time_gives_its_exit_code() -> None:
    assert jobs.run_limited([sys.executable, "-S", "-c", "raise SystemExit(3)"], 60) == 3


def load(home: Path) -> tuple[TableSpec, Measured]:
    spec = load_table(str(home / "small.toml"))[1]
    return spec, load_measured(spec, home / "results" / "small")


def test_every_precision_of_every_row_was_attacked(home: Path) -> None:
    _, rows = load(home)
    assert list(rows) == ["digits-reg", "digits-mpdsgr"]
    for ((record,),) in zip(rows.values(), strict=True):
        assert [(p, artefact.tier) for p, artefact in record.artefacts.items()] == [
            ("fp32", "commit"),
            ("int8", "commit"),
        ]
        assert len({artefact.artefact_sha256 for artefact in record.artefacts.values()}) == 2
        for artefact in record.artefacts.values():
            assert {"clean", "pgd", "pgd-strong", "strong adaptive", "square", "worst"} <= artefact.conditions.keys()
            assert artefact.n == 20
            assert artefact.health
            assert artefact.curves
        assert record.attacked is record.artefacts["fp32"]
        assert record.torch is None
        first = record.membranes[0]
        inside = [
            share
            for place, share in enumerate(first.share)
            if abs(first.start + (place + 0.5) * first.width) < first.half_width
        ]
        assert sum(inside) == pytest.approx(record.layers[0]["in_window"], abs=0.1)  # there: of other images


def test_the_page_shows_what_the_exported_networks_did(home: Path) -> None:
    _, rows = load(home)
    text = (home / "results" / "small" / table_page.PAGE).read_text()
    (record,) = rows["digits-mpdsgr"]
    old, new = (record.artefacts[p].verdicts("clean") for p in ("fp32", "int8"))
    flips = f"{(old & ~new).sum()} / {(~old & new).sum()}"
    (line,) = (line for line in text.splitlines() if line.startswith("| digits-mpdsgr | int8 |"))
    assert line.split(" | ")[2] == f"{100 * new.mean():.1f}"
    assert line.split(" | ")[5] == flips
    pictures = {p.name for p in (home / "results" / "small").glob("*.png")}
    assert pictures == {"plot.png", "growth.png", "membranes.png", "front.png"}


def test_what_is_brought_home_is_all_there_is(home: Path) -> None:
    with tarfile.open(home / "home" / "results.tar") as archive:
        names = set(archive.getnames())
    assert names == {f"small/{path.name}" for path in (home / "results" / "small").iterdir()}
    (home / "weights.tar").write_bytes(b"".join(p.read_bytes() for p in sorted((home / "home").glob("weights.tar.*"))))
    with tarfile.open(home / "weights.tar") as archive:
        archive.extractall(home / "unpacked", filter="data")
    runs = sorted((home / "runs" / "small").iterdir())
    assert [path.name for path in sorted((home / "unpacked").iterdir())] == [run.name for run in runs]
    for run in runs:
        half = home / "unpacked" / run.name
        assert load_checkpoint(half).recipe == load_checkpoint(run / "last").recipe
        (small, exact) = (load_network(path)[1].state_dict() for path in (half, run / "last"))
        for name, value in exact.items():
            assert torch.equal(small[name], value.half().to(value.dtype))


def test_records_of_another_evaluation_are_outdated(home: Path) -> None:
    spec, _ = load(home)
    record = records_of(home / "results" / "small")["digits-reg", 0]
    assert outdated(record, spec) is None
    more = spec.model_copy(update={"artefact": ExportSpec(tier="commit", precisions=("fp32", "fp16", "int8"))})
    assert "lacks exported networks" in str(outdated(record, more))
    for artefact in (ExportSpec(tier="release", precisions=("fp32", "int8")), None):
        changed = spec.model_copy(update={"artefact": artefact})
        assert "attack suite 3, and the current one is 4" in str(outdated(record, changed))


def test_a_row_whose_evaluation_ended_early_is_named_and_not_compared(home: Path) -> None:
    spec, rows = load(home)
    (record,) = rows["digits-mpdsgr"]
    cut = {p: a.model_copy(update={"stopped": "check 1 failed", "curves": {}}) for p, a in record.artefacts.items()}
    rows["digits-mpdsgr"] = [record.model_copy(update={"artefacts": cut})]
    text = table_sections.order(spec, rows)
    assert "Ended early, so not compared: digits-mpdsgr." in text
    assert "| digits-mpdsgr |" not in text + table_sections.precisions(rows)
    assert table_page.pictures(spec, rows).keys() == {"plot.png", "growth.png", "membranes.png", "front.png"}
    assert "| digits-mpdsgr |" not in front.section(rows)
    rows["digits-reg"] = [rows["digits-reg"][0].model_copy(update={"artefacts": cut})]
    assert table_page.pictures(spec, rows).keys() == {"plot.png", "membranes.png"}
    assert table_sections.GROWTH not in table_page.render("small", spec, rows)


def fake(row: str, defence: list[str], verdicts: list[list[int]]) -> list[Record]:
    """Records of one condition, a list of verdicts a seed: as much of them as a comparison reads."""
    return [
        SimpleNamespace(  # type: ignore[misc]
            row=row,
            seed=seed,
            recipe=SimpleNamespace(defence=dict.fromkeys(defence)),
            attacked=AttackedNetwork(
                images="",
                seed=0,
                n=len(own),
                conditions={"pgd": PackedVerdicts.of("", np.array(own, bool))},
                provenance={},
            ),
        )
        for seed, own in enumerate(verdicts)
    ]


def test_rows_are_compared_on_the_same_images_and_seeds() -> None:
    ours, theirs = fake("a", [], [[1, 1, 1, 0], [1, 1, 0, 0]]), fake("b", [], [[1, 0, 1, 0], [0, 0, 0, 1]])
    found = row_comparison.difference(ours, theirs, "pgd")
    gained = np.array([0.5, 1.0, 0.0, -0.5]) * 100  # of each image, mean over the seeds
    assert found.mean == pytest.approx(gained.mean()) == 25
    half = 1.96 * gained.std(ddof=1) / 2
    assert found[1:] == pytest.approx((25 - half, 25 + half), abs=0.01)
    by_seed, _ = row_comparison.paired(ours, theirs[1:], "pgd")  # another seed says nothing of this one
    assert by_seed.mean(1) == pytest.approx([25])
    assert row_comparison.difference(ours, ours, "pgd") == (0, 0, 0)
    nothing = fake("c", [], [[0, 0, 0, 0]])
    assert row_comparison.difference(nothing, nothing, "pgd") is None


def test_the_baseline_is_the_row_without_the_defence() -> None:
    names = {"reg": [], "sr": ["sr"], "at": ["at"], "at-sr": ["at", "sr"]}
    rows = {name: fake(name, defence, [[1]]) for name, defence in names.items()}
    assert row_comparison.baseline(rows, rows["sr"]) is rows["reg"]
    assert row_comparison.baseline(rows, rows["at-sr"]) is rows["at"]
    assert row_comparison.baseline(rows, rows["reg"]) is None
    assert row_comparison.baseline(rows, rows["at"]) is None
    del rows["at"]
    assert row_comparison.baseline(rows, rows["at-sr"]) is None


def test_the_largest_eta_within_the_budget_is_chosen() -> None:
    def row(accuracy: float, **settings: object) -> list[Record]:
        recipe = SimpleNamespace(defence={"mpd-sgr": settings} if settings else {})
        return [SimpleNamespace(recipe=recipe, curve={"validation_accuracy": [accuracy]})]  # type: ignore[list-item]

    rows = {
        "reg": row(0.500),
        "a": row(0.495, estimator="theorem", eta=0.1),
        "b": row(0.492, estimator="theorem", eta=0.5),
        "c": row(0.480, estimator="theorem", eta=1.0),
        "d": row(0.300, estimator="empirical", eta=0.1),
    }
    assert "| theorem | +0.50 | +0.80 | +2.00 | 0.5 |" in table_sections.choice(rows, 1.0)
    assert "| theorem | +0.50 | +0.80 | +2.00 | 1.0 |" in table_sections.choice(rows, 2.0)
    assert "| empirical | +20.00 | - | - | - |" in table_sections.choice(rows, 1.0)
