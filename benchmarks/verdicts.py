"""Can the verdict of `mpdsgr validate` be fooled? Planted faults must end in 1, 2 or 3, healthy bundles in 0.

    python benchmarks/verdicts.py --cache runs/verdicts

The faults are those of tests/faults, where each says what went wrong and who would cause it; here they meet the whole
validation, the fresh process included. Healthy are networks of several seeds, which train, draw and attack, in every
precision on every backend of a CPU. It lies here, since it measures and writes a results file; its table is a page
beside the gates, export/FAULTS.md, for whoever relies on the verdict. What is finished is kept in the cache.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import harness
import pytest

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.errors import MpdsgrError
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.validation import validate
from mpdsgr_deploy.validation.report import EXIT_CODES

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from faults import FAULTS, UNSEEN, Fault, InProcess, Networks, Target, judge, plant

NAME = "verdicts"
PAGE = Path(__file__).parent.parent / "export" / "FAULTS.md"
CASES = [
    ("fp32", "onnxruntime-cpu"),
    ("fp32", "openvino"),
    ("fp32", "torch"),
    *((precision, backend) for precision in ("fp16", "int8", "fp8") for backend in ("onnxruntime-cpu", "openvino")),
]


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where networks and outcomes are kept.")
@click.option("--seeds", type=click.IntRange(0), default=12, show_default=True, help="Healthy networks.")
@click.option("--part", type=click.Choice(["all", "faults", "healthy"]), default="all", show_default=True)
def main(cache: Path, seeds: int, part: str) -> None:
    """Validate all of them, or a part; write that part of the result, and the page."""
    networks, result = Networks(cache), harness.load(NAME)
    if part != "healthy":
        planted_faults = {"faults": FAULTS, "unseen": UNSEEN}
        result |= {name: list(planted(kind.values(), networks, cache)) for name, kind in planted_faults.items()}
        result["provenance"] = provenance()
    if part != "faults":
        result |= {"healthy": list(whole(networks, cache, seeds)), "healthy_provenance": provenance()}
    write_atomic(harness.RESULTS / f"{NAME}.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(PAGE, render(result).encode())


def planted(faults: Iterable[Fault], networks: Networks, cache: Path) -> Iterator[dict[str, Any]]:
    """Yield how every planted fault ends."""
    for fault in faults:
        file = cache / "outcomes" / f"fault {fault.name}.json"
        yield earlier(file) or keep(file, _outcome(fault, networks))


def _outcome(fault: Fault, networks: Networks) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        copy = plant(fault, networks, Path(folder) / "bundle", patch)
        verdict = judge(copy, Target)
        said = [reason.replace(f"{folder}/", "") for reason in verdict.said]
    planted_fault = fault._asdict() | {"precision": copy.precision, "backend": copy.backend}
    del planted_fault["plant"]
    n = verdict.report.rows[0].n if verdict.report else None
    return planted_fault | {"ended": verdict.code, "said": said, "n": n}


def whole(networks: Networks, cache: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield how networks without a fault end; the first case of each network also runs in a fresh process."""
    for seed in range(seeds):
        for number, (precision, backend) in enumerate(CASES):
            file = cache / "outcomes" / f"healthy {seed} {precision} {backend}.json"
            yield earlier(file) or keep(file, _healthy(networks, seed, precision, backend, fresh=number == 0))


def _healthy(networks: Networks, seed: int, precision: str, backend: str, *, fresh: bool) -> dict[str, Any]:
    case = {"seed": seed, "precision": precision, "backend": backend, "fresh process": fresh}
    kind = Target if fresh else InProcess
    try:
        report = validate(kind(networks.bundle(f"seed {seed}"), backend, precision))
    except MpdsgrError as error:
        return case | {"ended": error.exit_code, "said": [str(error)]}
    rows = {row.name: (row.artefact.correct, row.reference and row.reference.correct) for row in report.rows}
    code = EXIT_CODES[report.verdict]
    return case | {
        "ended": code,
        "said": [reason.line for reason in report.reasons],
        "n": report.rows[0].n,
        "rows": rows,
    }


def earlier(file: Path) -> dict[str, Any] | None:
    """Return an outcome of an earlier call."""
    return json.loads(file.read_bytes()) if file.exists() else None


def keep(file: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """Keep an outcome for the next call, and show it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(outcome).encode())
    click.echo(f"{outcome['ended']}  {file.stem}  {'; '.join(outcome['said'])[:120]}")
    return outcome


def by_design(unseen: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the section on faults that pass, because no evidence contradicts them."""
    ended = {fault["name"]: fault for fault in unseen}
    yield from ("## Not caught, by design", "")
    yield (
        "These bundles pass, because neither they nor the machine that validates them hold anything that contradicts "
        "what they state. They are planted too, so that this list is measured."
    )
    yield ""
    yield (
        "Transfer from a known network helps against one kind of decoy only. If the weights are available, comparing "
        "their export with the files, byte by byte or gradient by gradient, shows more. Other precisions are made from "
        "float32's file, so they contain its decoy too. The remaining kind is a decoy in a file without weights that "
        "is too weak for the checks of slopes and search: attacks on your own export, tried on the file, then break "
        "the images that it hides (`--transfer`; `weak decoy beside an export of ones own` above)."
    )
    yield from ("", "| fault | what went wrong | exit code | the report says | what helps |", "|---|---|---|---|---|")
    for fault in UNSEEN.values():
        outcome = ended.get(fault.name, {"ended": "not run yet", "said": []})
        remarks = [remark for remark in outcome["said"] if fault.caught and fault.caught in remark]
        cells = [fault.name, fault.story, outcome["ended"], remarks[0] if remarks else "", fault.helps]
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def render(result: dict[str, Any]) -> str:
    """Render the page: every fault that is still planted, how it ended and what caught it; then the healthy ones."""
    faults = [fault for fault in result["faults"] if fault["name"] in FAULTS]
    healthy = result["healthy"]
    passed = [case for case in healthy if case["ended"] == 0]
    caught = [fault for fault in faults if fault["ended"]]
    lines = [
        "# Can the verdict be fooled?",
        "",
        f"{len(faults)} faulty bundles and evaluations, {len(caught)} of them refused; {len(healthy)} healthy ones, "
        f"{len(passed)} of them passed. Written by `python benchmarks/verdicts.py`; the faults are functions in "
        "`tests/faults`, which `make test` runs too.",
        "",
        "If a fault lies in the artefact, hashes and golden logits were recomputed from the faulty file, as an "
        "exporter with that fault would compute them, so that only the promise (the reference in the bundle) or the "
        "float32 file can reveal the fault. Exit code 1: the artefact is worse or another one; 2: it cannot be "
        "evaluated; 3: the evaluation proves nothing. Messages are worded as they were in the measured revision.",
        "",
        "| fault | what went wrong | lies in | file | exit code | caught by | message |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in faults:
        by, said = catcher(fault)
        cells = [fault["name"], fault["story"], fault["place"], fault["precision"], fault["ended"], by, said]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    lines += ["", f"Healthy: {len({c['seed'] for c in healthy})} networks, each trained, attacked and exported with a "]
    lines[-1] += "seed of its own, in every precision, on every CPU backend."
    lines += ["", "| precision | backend | validations | passed |", "|---|---|---|---|"]
    for case in CASES:
        validations = [c for c in healthy if (c["precision"], c["backend"]) == case]
        lines.append(f"| {case[0]} | {case[1]} | {len(validations)} | {sum(c['ended'] == 0 for c in validations)} |")
    refused = [
        f"- seed {c['seed']}, {c['precision']}, {c['backend']}: {'; '.join(c['said'])}" for c in healthy if c["ended"]
    ]
    network = "vgg-small at width 0.25, T = 3, on the first 100 test images of digits, tier commit"
    whole_source = harness.source({"provenance": result["healthy_provenance"]})
    about = f"{network}. Faults: {harness.source(result)} Healthy: {whole_source}"
    unseen = by_design(result.get("unseen", []))
    return "\n".join([*lines, "", *refused, *([""] if refused else []), about, "", *since(faults), *unseen, ""])


def since(faults: list[dict[str, Any]]) -> list[str]:
    """The faults that were planted after the run, which `make test` runs but the table does not have yet, and those
    that end in another code now.
    """
    ended = {fault["name"]: fault["ended"] for fault in faults}
    new = [f"- {f.name} ({f.precision}): {f.story}" for f in FAULTS.values() if f.name not in ended]
    other = [
        f"- {name}: refused with {FAULTS[name].code} now" for name, code in ended.items() if code != FAULTS[name].code
    ]
    return ["## Planted or changed since this run", "", *new, *other, ""] if new or other else []


def catcher(fault: dict[str, Any]) -> tuple[str, str]:
    """Return the name of what caught a fault, and its message."""
    if not fault["said"]:
        return "nothing", ""
    reasons = sorted(fault["said"], key=lambda reason: not reason.startswith(f"{fault['caught']},"))
    said = next((reason for reason in reasons if fault["caught"] in reason), reasons[0])
    if said.startswith("check "):
        name, _, saw = said.partition(": ")
        return name, saw.partition("; ")[0]
    if fault["ended"] == 1:
        rules = {"newly wrong": "gate", "does not answer": "kept answers", "answers differ": "kept answers"}
        return next((rule for words, rule in rules.items() if words in said), "float32 sibling"), said
    return ("golden batch" if "golden batch" in said else "refused before the attack"), said


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
