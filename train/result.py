"""Results: what one row of a table measured with one seed, in one JSON file."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from table import Table

from mpdsgr_deploy.attacks.suite import TRANSFER
from mpdsgr_deploy.defences import resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import read_document
from mpdsgr_deploy.validation.evaluate import Evaluation
from mpdsgr_deploy.validation.report import Report

SCHEMA_VERSION = 1


class Membrane(BaseModel):
    """A layer's membrane potentials over all steps and channels: the share of them in each bin of v = U - V_th.

    The first bin begins at `start`; all are `width` wide. half_width: of the surrogate's window around v = 0.
    """

    layer: str
    half_width: float
    start: float
    width: float
    share: list[float]


class Result(BaseModel):
    """`epoch`: whose checkpoint was evaluated; `layers`: its membrane statistics then.

    `tier`: whose attacks torch's network met, None: those its recipe names. `artefacts`: the reports of the exported
    network's precisions, where the table has it exported; `evaluation` is then that of the first. `curve` has all
    epochs, `seconds` is the wall time of their training; `provenance` that of the training, the evaluation has its own.
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
    membranes: list[Membrane] = []
    tier: str | None = None
    evaluation: Evaluation
    artefacts: dict[str, Report] = {}
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
    asked = {} if table.artefact is None else dict.fromkeys(table.artefact.precisions, table.artefact.tier)
    if asked != {precision: report.tier for precision, report in result.artefacts.items()}:
        raise InputError(f"{path} does not have the exported networks that its table asks for")
    sent = any(row.name == TRANSFER for row in result.evaluation.rows)
    if table.artefact is None and (table.tier, table.row(result.row).transfer is not None) != (result.tier, sent):
        raise InputError(f"{path} was not measured under the attacks that its table asks for")
    return result
