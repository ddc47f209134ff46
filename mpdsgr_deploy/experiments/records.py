"""Records: the result of one row of a table with one seed, a line of the table's JSON-lines file."""

import base64
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mpdsgr_deploy.attacks.condition import TRANSFER
from mpdsgr_deploy.diagnostics.membrane import Membrane
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments.record_files import RECORDS, Rounded, read_records
from mpdsgr_deploy.experiments.table import TableSpec
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.validation.evaluate import Evaluation
from mpdsgr_deploy.validation.report import Report

KEY = ("row", "seed")
Bools = NDArray[np.bool_]


class PackedVerdicts(BaseModel):
    """The verdicts under one condition. settings: the attack's strength, in words; right: packed bits, in base64."""

    settings: str
    right: str

    @classmethod
    def of(cls, settings: str, right: Bools) -> "PackedVerdicts":
        return cls(settings=settings, right=base64.b64encode(np.packbits(right).tobytes()).decode())


class CheckOutcome(BaseModel):
    """The outcome of one health check. saw: what it found."""

    number: int
    name: str
    passed: bool
    saw: str


class AttackedNetwork(BaseModel):
    """The verdicts of a network on n images under every condition, in the order in which these were tried.

    images: a phrase that names the images and how they were chosen.
    """

    images: str
    seed: int
    n: int
    conditions: dict[str, PackedVerdicts]
    health: list[CheckOutcome] = []
    provenance: dict[str, Any]

    @classmethod
    def of(cls, evaluated: Evaluation | Report, **fields: Any) -> Self:
        """Return the record of an evaluation or a report. fields: further ones, and those to replace."""
        n = evaluated.rows[0].n
        common: dict[str, Any] = {
            "images": evaluated.images,
            "seed": evaluated.seed,
            "n": n,
            "conditions": {r.name: PackedVerdicts.of(r.settings, r.artefact.verdicts(n)) for r in evaluated.rows},
            # without explanations, which are the same in every record
            "health": [c.model_dump(include=set(CheckOutcome.model_fields)) for c in evaluated.health],
            "provenance": evaluated.provenance,
        }
        return cls(**common | fields)

    def verdicts(self, condition: str) -> Bools:
        """Return the verdicts [n] under a condition. Raises KeyError for a condition that was not tried."""
        packed = np.frombuffer(base64.b64decode(self.conditions[condition].right), np.uint8)
        return np.unpackbits(packed)[: self.n].astype(bool)

    def accuracy(self, condition: str) -> float:
        """Return the accuracy under a condition, in [0, 1]. Raises KeyError as `verdicts` does."""
        return int(self.verdicts(condition).sum()) / self.n


class AttackedExport(AttackedNetwork):
    """The verdicts of an exported network, and the verdict of `validate` on it.

    curves: (eps, number of correct images, number of images) for growing eps, by attack. stopped: why the evaluation
    ended before all conditions were tried, None if it did not.
    """

    verdict: str
    reasons: list[str]
    tier: str
    artefact_sha256: str
    curves: dict[str, list[tuple[float, int, int]]] = {}
    stopped: str | None = None

    @classmethod
    def of_report(cls, report: Report) -> "AttackedExport":
        return cls.of(
            report,
            provenance={**report.provenance, "network": f"the {report.precision} network on {report.backend}"},
            verdict=report.verdict,
            reasons=[str(reason) for reason in report.reasons],
            tier=report.tier,
            artefact_sha256=report.artefact_sha256,
            curves={curve.attack: [(p.eps, p.correct, p.n) for p in curve.points] for curve in report.curves},
            stopped=None if report.stopped is None else str(report.stopped),
        )


class WholeTestSet(BaseModel):
    """How many of all n test images a network classifies correctly without attack. provenance: of this count."""

    n: int
    correct: int
    provenance: dict[str, Any]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


class Start(BaseModel, frozen=True):
    """The trained network whose weights a training started from: that of a row with a seed, after `epoch` epochs.

    seconds: wall time of all trainings that led to it.
    """

    row: str
    seed: int
    epoch: int
    weights_sha256: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}, after epoch {self.epoch} (weights {self.weights_sha256[:12]})"


class Record(BaseModel):
    """The result of one row with one seed.

    suite: version of the attacks. checkpoint, epoch: which one of the run was evaluated, "last" or "best", and after
    how many epochs. recipe: how the network was trained and attacked. seconds: wall time of the training. curve: the
    values that training logged, one per epoch, by name. layers: the `LayerStatistics` of the last epoch. membranes:
    histograms of the potentials by layer, if the table shows them. tier: whose attacks were made on the torch network,
    None for those that the recipe names. torch: the evaluation of the torch network, or else artefacts: those of the
    exported network by precision. test_set: the torch network on all test images, of which few may be attacked; None
    in records of earlier versions. sensitivity: the result of `sensitivity.sensitivity`. provenance: that of the
    training. init: where the first weights are from, None for random ones.
    """

    schema_version: int = 2
    table: str
    row: str
    seed: int
    suite: int
    checkpoint: str
    epoch: int
    recipe: Recipe
    seconds: float
    curve: Annotated[dict[str, list[Any]], Rounded]
    layers: Annotated[list[dict[str, Any]], Rounded]
    membranes: Annotated[list[Membrane], Rounded] = []
    tier: str | None = None
    torch: AttackedNetwork | None = None
    artefacts: dict[str, AttackedExport] = {}
    test_set: WholeTestSet | None = None
    sensitivity: Annotated[dict[str, Any], Rounded]
    provenance: dict[str, Any]
    init: Start | None = None

    @property
    def seconds_before(self) -> float:
        """Wall time of all trainings that led to the first weights; 0 for random ones."""
        return 0.0 if self.init is None else self.init.seconds

    @property
    def attacked(self) -> AttackedNetwork:
        """The evaluation whose accuracies stand for the row: the torch network's, or the first precision's."""
        return self.torch or next(iter(self.artefacts.values()))


def records_of(folder: Path) -> dict[tuple[str, int], Record]:
    """Return all records of a table's folder by row and seed. Raises InputError as `read_records` does."""
    return {(r.row, r.seed): r for r in read_records(folder / RECORDS, Record)}


def outdated(record: Record, table: TableSpec) -> str | None:
    """Return why a record is not what its table now asks for; None if it is.

    Fields that later versions added to recipes count with their defaults, which keep the earlier behaviour. Raises
    InputError for a row whose recipe is not valid.
    """
    from mpdsgr_deploy.defences import resolved

    who = f"{record.row}, seed {record.seed},"
    if record.suite != table.suite:
        return f"{who} was measured with attack suite {record.suite}, and the current one is {table.suite}"
    row = table.row(record.row)
    now, before = table.recipe(row, record.seed).model_dump(), resolved(record.recipe).model_dump()
    if changed := [section for section in now if before[section] != now[section]]:
        return f"{who} was measured with another recipe (other values in {', '.join(changed)})"
    stated = None if row.init is None else (row.init, table.seed_of(table.row(row.init), record.seed))
    if stated != (None if record.init is None else (record.init.row, record.init.seed)):
        return f"{who} was trained from other weights than the table states"
    exports = {} if table.artefact is None else dict.fromkeys(table.artefact.precisions, table.artefact.tier)
    if exports != {precision: artefact.tier for precision, artefact in record.artefacts.items()}:
        return f"{who} lacks exported networks that the table states"
    transferred = TRANSFER in record.attacked.conditions
    lacking = {line.name for line in table.pgd_within(record.recipe.attack)} - set(record.attacked.conditions)
    if table.artefact is None and (lacking or (table.tier, row.transfer is not None) != (record.tier, transferred)):
        return f"{who} was not measured under all attacks that the table states"
    return None


Measured = dict[str, list[Record]]  # row -> its records, one per seed; without rows that were not measured


def load_measured(table: TableSpec, folder: Path) -> Measured:
    """Return the records of every measured row, in the order of the table.

    Records that are outdated or of no row are left out and logged. Raises InputError as `read_records` does.
    """
    known = {row.title for row in table.rows}
    by_row: Measured = {}
    for (row, _), record in sorted(records_of(folder).items()):
        try:
            reason = outdated(record, table) if row in known else f"{row} is not a row of the table"
        except InputError as error:
            reason = f"{row}, seed {record.seed}: {error}"
        if reason is None:
            by_row.setdefault(row, []).append(record)
        else:
            log.warning("not on the page: %s", reason)
    return {row.title: by_row[row.title] for row in table.rows if row.title in by_row}
