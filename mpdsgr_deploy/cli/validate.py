"""mpdsgr validate"""

from pathlib import Path

import click

from mpdsgr_deploy.api import rebuilding
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.cli.output import (
    json_option,
    opened_bundle,
    precision_option,
    print_json,
    print_table,
    signature_option,
)
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.signing.trust import required_trust
from mpdsgr_deploy.validation.gate import load_gate, signature_of_gate
from mpdsgr_deploy.validation.report import EXIT_CODES, NOT_COMPARED, Report, accuracy_text, not_compared, sensitivity
from mpdsgr_deploy.validation.writing import report_directory, write_report


@click.command("validate")
@click.argument("bundle")
@click.option(
    "--backend", default=DEFAULT_BACKEND, show_default=True, help="What runs the artefact; on a GPU none has run yet."
)
@precision_option
@signature_option
@click.option("--url", help="Validate the server there: http://HOST:PORT/v2/models/NAME, which serves BUNDLE.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Requests a second to --url, at most.",
)
@click.option("--tier", help=f"How much is attacked: {', '.join(TIERS)}.  [default: the gate's, else the reference's]")
@click.option("--gate", type=click.Path(path_type=Path), help="TOML file with the rules.  [default: the recipe's]")
@click.option("--data", help="Data set whose test images are used.  [default: the images in the bundle]")
@click.option("--root", help="Where the data set lies, whose images are then used.")
@click.option(
    "--limit", type=click.IntRange(1), help="Use N test images only, the same in every call.  [default: the tier's]"
)
@click.option("--transfer", type=click.Path(path_type=Path), help="Bundle or checkpoint to attack from too.")
@click.option(
    "--report",
    "report_dir",
    type=click.Path(path_type=Path),
    help="Directory to write.  [default: reports/NAME-PRECISION of the bundle]",
)
@click.option(
    "--rebuild/--no-rebuild",
    default=None,
    help="Export again from the bundle's weights and compare the files.  [default: where torch is installed]",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: str,
    backend: str,
    precision: str | None,
    signature: str | None,
    url: str | None,
    rate: float,
    tier: str | None,
    gate: Path | None,
    data: str | None,
    root: str | None,
    limit: int | None,
    transfer: Path | None,
    report_dir: Path | None,
    rebuild: bool | None,
    as_json: bool,
) -> None:
    """Attack BUNDLE's exported network and decide whether it is still as accurate and as robust as promised.

    Needs no torch: the network is attacked through its own attack graph, and held against the reference that
    `mpdsgr export` measured. Exit code 0 pass, 1 the gate failed, 3 the evaluation is not valid. The report directory
    gets report.json, junit.xml, summary.md, badge.json and, with the extra `report`, report.html. After a kill the same
    command goes on where it stopped.

    \b
    Example:
      mpdsgr validate bundles/digits --report reports/digits
      mpdsgr validate bundles/digits --precision int8 --tier release --report reports/int8
    """
    from mpdsgr_deploy.validation import Target, validate

    signature = signature or (signature_of_gate(gate) if gate else None)
    opened, chosen = opened_bundle(bundle, precision, required_trust(signature))
    report_dir = report_dir or Path("reports") / f"{opened.path.resolve().name}-{chosen}"
    opened.refuse_output(report_dir, "--report")
    with report_directory(report_dir):
        report = validate(
            Target(opened, backend, chosen, url, rate),
            gate=load_gate(gate) if gate else None,
            tier=tier,
            data=data,
            root=root,
            limit=limit,
            transfer=transfer,
            report_dir=report_dir,
            rebuild=rebuilding(rebuild),
        )
        best = write_report(report, report_dir)
    if as_json:
        print_json(report.model_dump())
    else:
        print_report(report)
        click.echo(f"report in {best}")
    ctx.exit(EXIT_CODES[report.verdict])


def print_report(report: Report) -> None:
    """Print the verdict, its reasons and the table of conditions."""
    rows = [
        (
            row.name,
            f"{100 * row.reference.accuracy:.1f}" if row.reference else NOT_COMPARED,
            accuracy_text(row, report.stopped),
            f"{row.flips.newly_wrong} / {row.flips.newly_right}" if row.flips else "-",
            f"{row.evaluations:.0f}",
        )
        for row in report.rows
    ]
    columns = ("condition", "torch %", "artefact % [95 %]", "newly wrong / right", "cost")
    print_table(columns, rows, f"{report.bundle}: {report.precision} on {report.backend}, {report.images}")
    click.echo(f"verdict: {report.verdict.upper()}")
    if report.signer:
        click.echo(f"  the bundle is signed by {report.signer}")
    for reason in report.reasons:
        click.echo(f"  {reason.line}")
    if report.stopped:
        click.echo(f"  {report.stopped.moment}: {report.stopped.why}")
    for remark in report.remarks:
        click.echo(f"  {remark}")
    for rule in report.rules:
        click.echo(f"  {rule.name} {rule.value} ({rule.origin})")
    if seen := sensitivity(report):
        click.echo(f"  {seen}")
    for name in not_compared(report):
        click.echo(f"  {name}: {NOT_COMPARED} with the reference, which met no such attack")
