"""mpdsgr validate"""

from pathlib import Path

import click

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.validation.gate import load_gate
from mpdsgr_deploy.validation.report import EXIT_CODES, Report, claim_report, percent, write_report


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default=DEFAULT_BACKEND, show_default=True, help="What runs the artefact.")
@click.option("--precision", default="fp32", show_default=True, help="Which of the bundle's networks.")
@click.option("--data", help="Data set whose test images are used.  [default: the recipe's]")
@click.option("--root", help="Where the data set lies.  [default: the recipe's]")
@click.option("--limit", type=click.IntRange(1), help="Use the first so many test images only.")
@click.option("--gate", type=click.Path(path_type=Path), help="TOML file with the allowed losses.")
@click.option("--transfer", type=click.Path(path_type=Path), help="Checkpoint of another network to attack from too.")
@click.option("--report", "report_dir", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    backend: str,
    precision: str,
    data: str | None,
    root: str | None,
    limit: int | None,
    gate: Path | None,
    transfer: Path | None,
    report_dir: Path,
    as_json: bool,
) -> None:
    """Check clean and attacked accuracy of BUNDLE's exported network against its torch model.

    Exit code 0 pass, 1 the gate failed, 3 the evaluation is not valid. The report directory gets report.json,
    junit.xml, summary.md, badge.json and, with the extra `report`, report.html.

    \b
    Example:
      mpdsgr validate bundles/digits --report reports/digits
    """
    from mpdsgr_deploy.validation import validate

    rules = load_gate(gate)
    claim_report(report_dir)
    opened = open_bundle(bundle)
    report = validate(
        opened,
        backend=backend,
        precision=precision,
        data=data,
        root=root,
        limit=limit,
        gate=rules,
        transfer=transfer,
    )
    best = write_report(report, report_dir)
    if as_json:
        print_json(report.model_dump())
    else:
        print_report(report)
        click.echo(f"report in {best}")
    ctx.exit(EXIT_CODES[report.verdict])


def print_report(report: Report) -> None:
    """The verdict, its reasons and the table of conditions."""
    rows = [
        (
            row.name,
            percent(row.reference) if row.reference else "-",
            percent(row.artefact),
            row.flips.newly_wrong if row.flips else "-",
            row.n,
        )
        for row in report.rows
    ]
    columns = ("condition", "torch % [95 %]", "artefact % [95 %]", "newly wrong", "n")
    print_table(columns, rows, f"{report.bundle}: {report.precision} on {report.backend}, {report.images}")
    click.echo(f"verdict: {report.verdict.upper()}")
    for reason in report.reasons:
        click.echo(f"  {reason}")
