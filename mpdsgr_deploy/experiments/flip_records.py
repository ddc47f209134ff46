"""Records of flipped spikes: one trained network in every precision against float32."""

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel

from mpdsgr_deploy.experiments.store import RECORDS, Rounded, read_records

FOLDER = "flips"
KEY = ("table", "row", "seed")
SCHEMA_VERSION = 1
EXPORTED = "neurons fp32"  # the neurons of the main tables


class LayerFlips(BaseModel):
    """Means over a layer's steps, as `StepFlips` has them; predicted: of density times fresh_moved, step by step."""

    firing_rate: float
    density: float
    rate: float
    moved: float
    fresh: float
    fresh_moved: float
    predicted: float


class PrecisionFlips(BaseModel):
    """A variant against float32, as `SpikeFlips` has it, by layer."""

    labels_changed: int
    unflipped: int
    logits_moved: float
    layers: dict[str, LayerFlips]

    def mean(self, field: str) -> float:
        """Of a field over layers, each with the same weight."""
        return fmean(getattr(layer, field) for layer in self.layers.values())


class FlipRecord(BaseModel):
    """One trained network: `checkpoint` says which of the run's, `n` is the number of test images."""

    schema_version: int = SCHEMA_VERSION
    table: str
    row: str
    seed: int
    checkpoint: str
    method: str
    network: str
    weights_sha256: str
    data: str
    n: int
    variants: Annotated[dict[str, PrecisionFlips], Rounded]
    provenance: dict[str, Any]

    def of(self, precision: str) -> PrecisionFlips:
        """The variant of a precision whose neurons compute in float32."""
        return self.variants[f"{precision}, {EXPORTED}"]


FlipRows = dict[tuple[str, str], list[FlipRecord]]  # (table, row) -> its seeds


def by_network(folder: Path) -> dict[tuple[str, str, int], FlipRecord]:
    """The records of a folder by table, row and seed."""
    return {(r.table, r.row, r.seed): r for r in read_records(folder / RECORDS, FlipRecord, SCHEMA_VERSION)}


def load(folder: Path) -> FlipRows:
    """All records of a folder."""
    rows: FlipRows = {}
    for record in sorted(by_network(folder).values(), key=lambda r: (r.table, strength(r), r.row, r.seed)):
        rows.setdefault((record.table, record.row), []).append(record)
    return rows


def is_sweep(key: tuple[str, str]) -> bool:
    """Whether a row is one of the sweep over eta, its network without MPD-SGR included."""
    table, row = key
    return table == "mpdsgr-cifar10" and (row.startswith("eta-") or row.endswith("-reg"))


def strength(result: FlipRecord) -> float:
    """eta, which a row of the sweep has in its name; 0 without MPD-SGR."""
    return float(result.row.removeprefix("eta-")) if result.row.startswith("eta-") else 0.0
