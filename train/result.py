"""Results: what one row of a table measured with one seed, in one JSON file."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from table import Table

from mpdsgr_deploy.defences import resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import read_document
from mpdsgr_deploy.validation.evaluate import Evaluation

SCHEMA_VERSION = 1


class Result(BaseModel):
    """`epoch`: whose checkpoint was evaluated; `layers`: its membrane statistics then.

    `curve` has all epochs, `seconds` is the wall time of their training; `provenance` that of the training, the
    evaluation has its own.
    """

    schema_version: int = SCHEMA_VERSION
    table: str
    row: str
    seed: int
    recipe: Recipe
    epoch: int
    seconds: float
    curve: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    evaluation: Evaluation
    sensitivity: dict[str, Any]
    provenance: dict[str, Any]


def result_path(folder: Path, row: str, seed: int) -> Path:
    """Where a result lies."""
    return folder / f"{row}-seed{seed}.json"


def read_result(path: Path, table: Table) -> Result:
    """A row's result. Raises InputError if it is damaged, or was measured with another recipe than the row has now.

    A recipe field added since then does not make it another recipe, as long as its default is how things were.
    """
    result: Result = read_document(path, Result, SCHEMA_VERSION, otherwise="measure it again")
    now = table.recipe(table.row(result.row), result.seed).model_dump()
    before = resolved(result.recipe).model_dump()
    if changed := [section for section in now if before[section] != now[section]]:
        raise InputError(f"{path} was measured with another recipe (other values in {', '.join(changed)})")
    return result
