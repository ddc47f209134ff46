"""The committed results: every page shows what its records hold, and what is found quotes a page."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpdsgr_deploy.defences import base, build_defended
from mpdsgr_deploy.defences.base import neuron_shapes
from mpdsgr_deploy.experiments import flip_records, flips_page, table_page
from mpdsgr_deploy.experiments.record_files import RECORDS
from mpdsgr_deploy.experiments.records import load_measured, records_of
from mpdsgr_deploy.experiments.table import built_in_tables, load_table
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "train" / "results"
TABLES = list(built_in_tables())
MEASURED = [name for name in TABLES if (RESULTS / name / RECORDS).exists()]
IMAGES = {  # shape and number of classes
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny-imagenet": ((3, 64, 64), 200),
}
SHAPES: dict[tuple[str, int, tuple[int, int, int]], dict[str, Any]] = {}  # a network's, by its modules, T and input


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_of_a_table_exist_and_are_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shapes(model: SpikingNet, shape: tuple[int, int, int]) -> dict[str, Any]:
        """As `neuron_shapes`, whose pass over all steps takes longest: once for the many rows of a network."""
        known = SHAPES.get(network := (repr(model), model.T, shape))
        return known or SHAPES.setdefault(network, neuron_shapes(model, shape))

    monkeypatch.setattr(base, "neuron_shapes", shapes)
    spec = load_table(name)[1]
    for row in spec.rows:
        recipe = load_recipe(find_recipe(row.recipe), spec.overrides(row))
        assert recipe.defence.keys() == load_recipe(find_recipe(row.recipe)).defence.keys()  # none added, none lost
        resolved = spec.recipe(row, seed=7)
        assert resolved.training.seed == 7
        with torch.device("meta"):
            model, defences = build_defended(resolved, *IMAGES[resolved.data.name])
        assert len(model.layers()) > 0
        assert len(defences) == len(resolved.defence)


@pytest.mark.parametrize("name", MEASURED)
def test_a_committed_page_is_what_its_records_give(name: str) -> None:
    spec = load_table(name)[1]
    folder = RESULTS / name
    rows = load_measured(spec, folder)
    kept = [record for records in rows.values() for record in records]
    assert len(kept) == len(records_of(folder)) > 0  # none is left out
    assert (folder / table_page.PAGE).read_text() == table_page.render(name, spec, rows)
    for readme in (ROOT / "train" / "README.md", ROOT / "README.md"):
        assert table_page.quote(name, rows, readme.read_text()) == readme.read_text()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == sorted(table_page.pictures(spec, rows))
    for picture in pictures:
        assert f"]({picture})" in (folder / table_page.PAGE).read_text()
    for record in kept:
        assert record.table == name
        assert record.recipe.data.root == "data"
        assert record.checkpoint == "last"
        for origin in (record.provenance, record.attacked.provenance):
            assert origin["hardware"]["cpu"]
            assert origin["packages"]["torch"]
        assert record.seconds == pytest.approx(sum(record.curve["seconds"]), abs=0.06)


def test_results_stay_small() -> None:
    files = [path for folder in ("train", "export") for path in (ROOT / folder / "results").rglob("*.*")]
    assert len(files) < 75
    assert sum(path.stat().st_size for path in files) < 5_000_000


def test_the_page_of_flips_is_what_its_records_give() -> None:
    folder = RESULTS / flip_records.FOLDER
    rows = flip_records.load(folder)
    text = (folder / flips_page.PAGE).read_text()
    assert text == flips_page.render(rows)
    assert (folder / flips_page.PLOT).read_bytes()[:4] == b"\x89PNG"
    figures = re.findall(r"(?<![\w:.])\d+\.\d+(?![\w.])", (folder / "FINDINGS.md").read_text())
    assert len(figures) > 20
    assert [figure for figure in figures if figure not in text] == []
    for record in flips_page.every(rows):
        assert record.n >= 490
        assert record.provenance["packages"]["onnxruntime"]
        assert "dirty" not in record.provenance["revision"]
