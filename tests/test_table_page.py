"""What the page of a table says about its records, here those of the committed table `digits`."""

import numpy as np
import pytest

from mpdsgr_deploy.attacks.condition import WORST
from mpdsgr_deploy.checkpoint import VALIDATION_PGD
from mpdsgr_deploy.experiments import front
from mpdsgr_deploy.experiments.page_parts import exceptions
from mpdsgr_deploy.experiments.records import Measured, PackedVerdicts, Start, load_measured
from mpdsgr_deploy.experiments.table import TableSpec, load_table
from mpdsgr_deploy.experiments.table_page import EPOCHS_PLOT, pictures, render, training_time
from mpdsgr_deploy.experiments.table_sections import mean
from mpdsgr_deploy.recipes import shipped

NAME = "digits"


@pytest.fixture
def table() -> TableSpec:
    return load_table(NAME)[1]


@pytest.fixture
def measured(table: TableSpec) -> Measured:
    return load_measured(table, shipped("train") / "results" / NAME)


def test_a_page_says_which_run_was_cut_and_which_started_from_weights(measured: Measured) -> None:
    first, second = measured["reg"]
    assert exceptions([first, second]) == []
    start = Start(row="earlier", seed=2, epoch=7, weights_sha256="0123456789abcdef", seconds=60)
    second, cut = second.model_copy(update={"init": start}), first.model_copy(update={"init": start, "epoch": 9})
    assert exceptions([second, cut]) == [
        "- reg, seed 0: cut after epoch 9 of 15, at T = 4",
        "- started from earlier, seed 2, after epoch 7 (weights 0123456789ab): reg, seed 0, 1",
    ]
    assert training_time([cut]) == f"{cut.seconds / 60:.1f} min after 1.0 min"


def test_the_front_has_the_rows_that_no_other_row_beats_and_their_whole_training(measured: Measured) -> None:
    """Of any two rows, the one that is at least as good in both and better in one keeps the other out."""
    figures = {row: (front.validation_accuracy(records), mean(records, WORST)) for row, records in measured.items()}
    beaten = {r for r, (a, b) in figures.items() for c, d in figures.values() if c >= a and d >= b and (c, d) != (a, b)}
    assert 0 < len(beaten) < len(figures)
    shown = [line.split(" | ")[0][2:] for line in front.section(measured).splitlines() if line.startswith("| ")][2:]
    assert sorted(shown) == sorted(figures.keys() - beaten)
    assert front.picture(measured)[:4] == b"\x89PNG"
    start = Start(row="earlier", seed=2, epoch=7, weights_sha256="0123456789abcdef", seconds=600)
    one = [record.model_copy(update={"init": start, "seconds": 30}) for record in measured[shown[0]]]
    assert "| 10.5 min |" in front.section({shown[0]: one})


def test_a_table_in_which_no_image_survives_all_attacks_has_no_front(measured: Measured) -> None:
    (record, *_) = measured["reg"]
    nothing = PackedVerdicts.of("", np.zeros(record.attacked.n, bool))
    broken = record.attacked.model_copy(update={"conditions": {**record.attacked.conditions, WORST: nothing}})
    rows = {"reg": [record.model_copy(update={"torch": broken})]}
    assert front.section(rows) == ""
    assert front.picture(rows) is None


def test_a_defence_of_the_users_own_is_shown_without_editing_anything(table: TableSpec, measured: Measured) -> None:
    own = measured["mpdsgr"][0].recipe.model_copy(update={"defence": {"my-defence": {}}})
    rows = {**measured, "mpdsgr": [record.model_copy(update={"recipe": own}) for record in measured["mpdsgr"]]}
    assert "| mpdsgr | MY-DEFENCE | 0, 1 |" in render(NAME, table, rows)
    assert pictures(table, rows)["plot.png"][:4] == b"\x89PNG"


def test_accuracy_under_pgd_is_drawn_by_epoch_where_it_was_measured(table: TableSpec, measured: Measured) -> None:
    rows = {"reg": measured["reg"], "mpdsgr": measured["mpdsgr"]}
    assert EPOCHS_PLOT not in pictures(table, rows)
    assert EPOCHS_PLOT not in render(NAME, table, rows)
    first, *others = rows["mpdsgr"]
    curve = {**first.curve, VALIDATION_PGD: first.curve["validation_accuracy"]}
    rows["mpdsgr"] = [first.model_copy(update={"curve": curve}), *others]
    assert pictures(table, rows)[EPOCHS_PLOT][:4] == b"\x89PNG"
    assert f"({EPOCHS_PLOT})" in render(NAME, table, rows)
