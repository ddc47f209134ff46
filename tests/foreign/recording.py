"""A results file that one run writes: its setting, every case's record, the versions, and where it was made."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpdsgr_deploy.provenance import provenance

HERE = Path(__file__).parent
Record = dict[str, Any]


def record(
    name: str, setting: Mapping[str, Any], cases: Mapping[str, Callable[[], Record]], packages: Sequence[str] = ()
) -> None:
    """Measure every case and write NAME.json beside this file, once all are measured.

    setting: what the records depend on, with the number of images and the seed. packages: whose versions are named,
    beside those of every provenance. A run that was killed goes on where it stopped, from NAME.partial.json, if
    setting, revision and versions are the same.
    """
    begun = {
        "setting": dict(setting),
        "versions": {package: version(package) for package in packages},
        "records": {},
        "provenance": provenance(),
    }
    partial = HERE / f"{name}.partial.json"
    result = json.loads(partial.read_bytes()) if partial.exists() else begun
    if _identity(result) != _identity(begun):
        result = begun
    for case, measure in cases.items():
        if case not in result["records"]:
            result["records"][case] = measure()
            partial.write_text(json.dumps(result, indent=1) + "\n")
            print(case, json.dumps(result["records"][case]), flush=True)
    result["records"] = {case: result["records"][case] for case in cases}
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    partial.unlink(missing_ok=True)


def _identity(result: Mapping[str, Any]) -> tuple[Any, ...]:
    origin = result["provenance"]
    return result["setting"], result["versions"], origin["revision"], origin["packages"], origin["hardware"]


def load(name: str) -> dict[str, Any]:
    """The result that a run wrote."""
    return json.loads((HERE / f"{name}.json").read_bytes())


def source(result: Mapping[str, Any]) -> str:
    """Where a result comes from, in one line."""
    origin, machine = result["provenance"], result["provenance"]["hardware"]
    packages = {"onnxruntime": origin["packages"]["onnxruntime"], **result["versions"]}
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    commit, plus, dirty = (origin["revision"] or "unknown").partition("+")
    revision = commit[:12] + plus + dirty
    return f"{machine['cores']} cores of {machine['cpu']}; {versions}; revision {revision}; {origin['created'][:10]}."
