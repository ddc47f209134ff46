"""mpdsgr demo"""

import shutil
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.attacks.condition import CLEAN, FGSM, GAUSSIAN, STRONG, WORST
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe
from mpdsgr_deploy.validation.report import Report
from mpdsgr_deploy.validation.writing import report_directory, write_report

RECIPE = "digits-robust"
COLUMNS = (CLEAN, GAUSSIAN, FGSM, STRONG, WORST)
NO_FLOORS = "gate.floors={}"  # the recipe's floors do not apply, because accuracy differs by some points between CPUs


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Directory for the run, the bundles and the reports.",
)
@json_option
def command(out: Path, as_json: bool) -> None:
    """Train, export and validate a small network, then a damaged copy.

    Takes a few minutes on a CPU. It trains a robust network on scikit-learn's digits, exports it to ONNX, and attacks
    the torch network and the exported one. Then it damages the weights in two copies of the bundle. In the second copy
    it also recomputes the hashes and the expected answers, as someone would who wants to hide the damage. The first
    copy must be refused when it is opened, the second by validation. If --out holds an interrupted demo, it continues.

    \b
    Example:
      mpdsgr demo
    """
    need("lightning_fabric", "train")
    from mpdsgr_deploy.exporting import export
    from mpdsgr_deploy.training import train

    with report_directory(out / "report"), report_directory(out / "report-damaged"):
        train(load_recipe(find_recipe(RECIPE), (NO_FLOORS,)), out / "run", resume=True)
        bundle = export(out / "run", out / "bundle")
        report = judge(bundle, out / "report")
        refusal, damaged_report = damaged(bundle, out)
    if as_json:
        print_json({"report": report.model_dump(), "refusal": refusal, "damaged": damaged_report.model_dump()})
    else:
        print_demo(report, damaged_report)
        click.echo(f"exported network: {report.verdict.upper()}, report in {out / 'report'}")
        click.echo(f"damaged copy: refused when opened: {refusal}")
        click.echo(f"damaged copy with new hashes: {damaged_report.verdict.upper()}: {damaged_report.reasons[0]}")
    if report.verdict != "pass":
        raise EvaluationError(f"the exported network is not as good as the torch network: {report.reasons[0]}")


def judge(bundle: Bundle, report_dir: Path) -> Report:
    from mpdsgr_deploy.validation import Target, validate

    report = validate(Target(bundle), report_dir=report_dir)
    write_report(report, report_dir)
    return report


def damaged(bundle: Bundle, out: Path) -> tuple[str, Report]:
    """Return why a damaged copy is refused when it is opened, and the report about it after its hashes were adapted.

    Raises EvaluationError if the copy is opened in the first case, or passes in the second.
    """
    from mpdsgr_deploy.damage import cover_up, damage

    copy = out / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    damage(bundle, copy)
    try:
        open_bundle(copy)
    except InputError as error:
        refusal = str(error)
    else:
        raise EvaluationError(f"{copy} was opened although its network is damaged")
    report = judge(open_bundle(cover_up(copy, bundle)), out / "report-damaged")
    if report.verdict == "pass":
        raise EvaluationError(f"{copy} passed although its network is damaged")
    return refusal, report


def print_demo(report: Report, damaged_report: Report) -> None:
    rows = {row.name: row for row in report.rows}
    # without `worst` if the validation stopped because the gate had failed: it then covers only the attacks before
    damaged_rows = {row.name: row for row in damaged_report.rows if not (damaged_report.stopped and row.name == WORST)}
    accuracies: dict[str, dict[str, Any]] = {
        "torch": {name: row.reference for name, row in rows.items()},
        "exported to ONNX": {name: row.artefact for name, row in rows.items()},
        "damaged copy": {name: row.artefact for name, row in damaged_rows.items()},
    }
    table = []
    for network, by_condition in accuracies.items():
        scores = [by_condition.get(name) for name in COLUMNS]
        table.append((network, *(f"{100 * score.accuracy:.1f}" if score else "-" for score in scores)))
    print_table(("network", *COLUMNS), table, f"accuracy in %, {report.images}, seed {report.seed}")
