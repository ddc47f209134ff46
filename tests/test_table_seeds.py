"""Tables whose seeds all start from the same networks, and seeds that were not measured."""

from pathlib import Path

import pytest

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments.jobs import runs_of
from mpdsgr_deploy.experiments.page_parts import unmeasured
from mpdsgr_deploy.experiments.records import Record
from mpdsgr_deploy.experiments.table import TableSpec, load_table
from mpdsgr_deploy.experiments.table_run import Places, Run

TABLE = """
title = "A network and its fine-tuning"
seeds = [0, 1, 3]
start_seed = 7

[[rows]]
recipe = "digits-reg"

[[rows]]
recipe = "digits-mpdsgr"
init = "digits-reg"

[[rows]]
name = "longer"
recipe = "digits-mpdsgr"
init = "digits-mpdsgr"
"""
PLACES = Places(Path("runs"), "data", Path("results"))


def loaded(folder: Path, text: str) -> TableSpec:
    (folder / "tuned.toml").write_text(text)
    return load_table(str(folder / "tuned.toml"))[1]


def chain(run: Run) -> list[str]:
    return [str(run), *(chain(run.init) if run.init is not None else [])]


def test_all_seeds_start_from_the_network_of_the_start_seed(tmp_path: Path) -> None:
    table = loaded(tmp_path, TABLE)
    runs = [*runs_of("tuned", table, table.rows, PLACES, ())]
    start = "digits-reg, seed 7"
    expected = [[start]]
    for seed in (0, 1, 3):
        tuned = f"digits-mpdsgr, seed {seed}"
        expected += [[tuned, start], [f"longer, seed {seed}", tuned, start]]
    assert [chain(run) for run in runs] == expected
    assert [str(run) for run in runs_of("tuned", table, table.rows[:1], PLACES, (1,))] == [start]

    own = loaded(tmp_path, TABLE.replace("start_seed = 7", ""))
    last = [*runs_of("tuned", own, own.rows, PLACES, ())][-1]
    assert chain(last) == [f"{row}, seed 3" for row in ("longer", "digits-mpdsgr", "digits-reg")]


def test_a_start_seed_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    first_row, _, _ = TABLE.partition('\n\n[[rows]]\nrecipe = "digits-mpdsgr"')
    with pytest.raises(InputError, match=r"start_seed .* no row has init; leave it out"):
        loaded(tmp_path, first_row)


def test_images_cannot_be_transferred_from_a_row_with_one_seed(tmp_path: Path) -> None:
    """The network of its next seed would be the network itself."""
    transferred = TABLE.replace('recipe = "digits-reg"', 'recipe = "digits-reg"\ntransfer = "digits-reg"')
    with pytest.raises(InputError, match=r"need networks of two seeds, and digits-reg, .* has one"):
        loaded(tmp_path, transferred)
    loaded(tmp_path, transferred.replace("start_seed = 7", ""))


def test_the_page_names_the_seeds_that_were_not_measured(tmp_path: Path) -> None:
    table = loaded(tmp_path, TABLE)

    def records(*seeds: int) -> list[Record]:
        return [Record.model_construct(seed=seed) for seed in seeds]

    measured = {"digits-reg": records(7), "digits-mpdsgr": records(1)}
    assert unmeasured(table, measured) == "Not measured: longer; seed 0 of digits-mpdsgr; seed 3 of digits-mpdsgr."
    everything = {"digits-reg": records(7), "digits-mpdsgr": records(0, 1, 3), "longer": records(0, 1, 3)}
    assert unmeasured(table, everything) == ""
