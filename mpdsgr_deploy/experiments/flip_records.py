"""Records of flipped spikes: a trained network in every precision compared with float32."""

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel

from mpdsgr_deploy.experiments.record_files import RECORDS, Rounded, read_records

FOLDER = "flips"
KEY = ("table", "row", "seed")
EXPORTED = "neurons fp32"  # number format of the neurons in the main tables


class LayerFlips(BaseModel):
    """The fields of `StepFlips`, averaged over a layer's steps. predicted: the mean of density times fresh_moved."""

    firing_rate: float
    density: float
    rate: float
    moved: float
    fresh: float
    fresh_moved: float
    predicted: float


class PrecisionFlips(BaseModel):
    """A variant compared with float32: the fields of `SpikeFlips`, with steps averaged by layer."""

    labels_changed: int
    unflipped: int
    logits_moved: float
    layers: dict[str, LayerFlips]

    def mean(self, field: str) -> float:
        """Return the mean of a field of `LayerFlips` over the layers, each with the same weight."""
        return fmean(getattr(layer, field) for layer in self.layers.values())


class FlipRecord(BaseModel):
    """The record of one trained network.

    checkpoint: which one of the run was measured, "last" or "best". method, network: phrases that describe training and
    architecture. n: number of test images. variants: by the names of `flip_measurement.variants`.
    """

    schema_version: int = 1
    table: str
    row: str
    seed: int
    checkpoint: str
    method: str
    defence: dict[str, dict[str, Any]]  # the section `defence` of the run's recipe
    network: str
    weights_sha256: str
    data: str
    n: int
    variants: Annotated[dict[str, PrecisionFlips], Rounded]
    provenance: dict[str, Any]

    @property
    def eta(self) -> float:
        """The weight of the regulariser, over which sweeps go; 0 if no defence has such a weight."""
        return max((settings["eta"] for settings in self.defence.values() if "eta" in settings), default=0.0)

    def of(self, precision: str) -> PrecisionFlips:
        """Return the variant of a precision whose neurons compute in float32."""
        return self.variants[f"{precision}, {EXPORTED}"]


FlipRows = dict[tuple[str, str], list[FlipRecord]]  # (table, row) -> its seeds


def by_network(folder: Path) -> dict[tuple[str, str, int], FlipRecord]:
    """Return the records of a folder by table, row and seed. Raises InputError as `read_records` does."""
    return {(r.table, r.row, r.seed): r for r in read_records(folder / RECORDS, FlipRecord)}


def load(folder: Path) -> FlipRows:
    """Return the records of a folder by table and row. Raises InputError as `read_records` does."""
    rows: FlipRows = {}
    for record in sorted(by_network(folder).values(), key=lambda r: (r.table, r.eta, r.row, r.seed)):
        rows.setdefault((record.table, record.row), []).append(record)
    return rows


def baselines(rows: FlipRows) -> dict[tuple[str, str], tuple[str, str]]:
    """Map each row with a regulariser (a defence with eta) to a row of its table that has only its other defences.

    Rows without such a counterpart are left out.
    """
    by_defences = {(table, frozenset(records[0].defence)): (table, row) for (table, row), records in rows.items()}
    paired = {}
    for (table, row), records in rows.items():
        regularised = {name for name, settings in records[0].defence.items() if "eta" in settings}
        without = by_defences.get((table, frozenset(records[0].defence.keys() - regularised)))
        if regularised and without is not None:
            paired[table, row] = without
    return paired


def sweep(rows: FlipRows) -> list[FlipRecord]:
    """Return the first records of all rows that share a baseline with another row, and of the baseline, by eta.

    Such rows are a sweep over eta. The result is empty without any.
    """
    paired = baselines(rows)
    shared = [without for without in paired.values() if list(paired.values()).count(without) > 1]
    swept = dict.fromkeys([*shared, *(row for row, without in paired.items() if without in shared)])
    return sorted((rows[row][0] for row in swept), key=lambda record: record.eta)
