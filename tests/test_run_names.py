"""Where the training of a table's row lies: by what it was trained with, and by nothing else."""

from pathlib import Path
from typing import Any

from conftest import small_recipe

from mpdsgr_deploy.defences import resolved
from mpdsgr_deploy.experiments.table import RowSpec, TableSpec
from mpdsgr_deploy.experiments.table_run import Places, Run


def directory(init: Run | None = None, **sections: Any) -> Path:
    return run(init, **sections).directory


def run(init: Run | None = None, **sections: Any) -> Run:
    recipe = resolved(small_recipe(**sections))
    table = TableSpec(title="", rows=(RowSpec(recipe="digits"),))
    return Run("table", table, "row", recipe, Places(Path("runs"), "data", Path("results")), init)


def test_attacks_and_gates_train_nothing_anew() -> None:
    assert directory() == directory(attack={"eps": 0.2}, validation={"limit": 7}, gate={"floors": {"worst": 0.4}})


def test_what_is_left_at_its_default_does_not_count() -> None:
    """So a key that a later version adds, at the value that stands for what was there before, changes no name."""
    assert directory(encoding={"levels": 2}, defence={"dlif": {"norm": "l2"}}) == directory(defence={"dlif": {}})


def test_what_training_depends_on_counts() -> None:
    names = [
        directory(),
        directory(training={"lr": 0.3}),
        directory(encoding={"name": "sqe"}),
        directory(encoding={"name": "sqe", "levels": 3}),
        directory(defence={"dlif": {}}),
        directory(defence={"dlif": {"norm": "l1"}}),
        directory(init=run()),
        directory(init=run(training={"lr": 0.3})),
    ]
    assert len(set(names)) == len(names)
