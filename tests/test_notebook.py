"""The notebook runs from top to bottom, smaller than it stands there, and holds no outputs."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parent.parent / "export" / "adopt.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SMALL = {"IMAGES": 20, "MAX_DROP": 0.5, "FLOOR": 0.05, "EPOCHS": 2, "TUNING_EPOCHS": 1}


def test_outputs_are_stripped() -> None:
    assert [cell["id"] for cell in CODE if cell["outputs"] or cell["execution_count"] is not None] == []
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert len(links) > 1
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.usefixtures("loggers")
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in CODE:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names.keys() >= SMALL.keys()
            names.update(SMALL)
    before, after = names["before"], names["after"]
    assert {before.verdict, after.verdict} <= {"pass", "fail"}, (before.health, after.health)
    assert before.row("clean").artefact.accuracy > 0.2
    assert after.row("pgd").n == 20
    shown = capsys.readouterr().out
    assert "worst of these" in shown  # the two reports were paired
