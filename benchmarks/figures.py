"""Results files of the benchmarks and the tables of benchmarks/README.md that show them: no number typed in by hand."""

import json
from pathlib import Path
from typing import Any

from mpdsgr_deploy.files import write_atomic

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"


def load(name: str) -> dict[str, Any]:
    """The result that benchmarks/NAME.py wrote."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_bytes())


def shown(name: str) -> str:
    """The table that the page shows of that result."""
    begin, end = markers(name)
    return PAGE.read_text().partition(begin)[2].partition(end)[0]


def publish(name: str, result: dict[str, Any], table: str) -> None:
    """Write the results file, and its table into the page."""
    write_atomic(FOLDER / "results" / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    begin, end = markers(name)
    before, _, rest = PAGE.read_text().partition(begin)
    write_atomic(PAGE, f"{before}{begin}{table}{end}{rest.partition(end)[2]}".encode())


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a table."""
    return f"<!-- table: python benchmarks/{name}.py -->\n", f"<!-- end of {name} -->\n"


def source(result: dict[str, Any]) -> str:
    """Where a result comes from, in one line."""
    found = result["provenance"]
    hardware = found["hardware"]
    device = " + ".join([f"{hardware['cores']} cores of {hardware['cpu']}", *hardware.get("gpus", [])])
    commit, _, dirty = (found["revision"] or "unknown").partition("+")
    revision = commit[:12] + ("+" + dirty if dirty else "")
    return f"{device}; torch {found['packages']['torch']}; revision {revision}; {found['created'][:10]}."
