"""mpdsgr validate"""

from pathlib import Path

import click

from mpdsgr_deploy.api import rebuilding
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.cli.backend_option import backend_option
from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.output import (
    json_option,
    opened_bundle,
    precision_option,
    print_json,
    print_table,
    signature_option,
)
from mpdsgr_deploy.signing.trust import required_trust
from mpdsgr_deploy.validation.gate import load_gate, signature_of_gate
from mpdsgr_deploy.validation.report import EXIT_CODES, NOT_COMPARED, Report, accuracy_text, not_compared, sensitivity
from mpdsgr_deploy.validation.writing import report_directory, write_report


@click.command("validate")
@click.argument("bundle")
@backend_option
@precision_option
@signature_option
@click.option("--url", help="Attack the server at http://HOST:PORT/v2/models/NAME, which must serve BUNDLE.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Largest number of requests per second to send to --url.",
)
@click.option(
    "--tier", help=f"Which set of attacks to run: {', '.join(TIERS)}.  [default: the gate's, else the reference's]"
)
@click.option(
    "--gate",
    type=click.Path(path_type=Path),
    help="TOML file with the rules of the gate.  [default: the recipe's gate]",
)
@click.option("--data", help="Data set from which to take the test images.  [default: the images in the bundle]")
@click.option("--root", help="Directory of the data set; its images replace those in the bundle.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="Use only N test images, the same in every call.  [default: the tier's number]",
)
@click.option(
    "--transfer",
    type=click.Path(path_type=Path),
    help="Another bundle or checkpoint, on which adversarial images are also computed (a transfer attack).",
)
@click.option(
    "--report",
    "report_dir",
    type=click.Path(path_type=Path),
    help="Directory for the report.  [default: reports/NAME-PRECISION, with the bundle's name]",
)
@click.option(
    "--rebuild/--no-rebuild",
    default=None,
    help="Also export again from the bundle's weights and compare the files.  [default: if torch is installed]",
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
    """Attack a bundle's network and compare it with its reference.

    The verdict is about the exported network itself, and torch is not needed: the attacks use a graph with gradients
    that is derived from the ONNX file. Accuracies with and without attacks are compared with the reference that
    `mpdsgr export` measured on the torch network. The tiers are sets of attacks: commit (350 images, some minutes, for
    every change), release (1,000 images, stronger attacks), paper (all test images, the strongest attacks).

    Exit code: 0 the gate passed, 1 the gate failed, 3 the evaluation is not valid. The report directory gets
    report.json, junit.xml, summary.md, badge.json and, if the extra `report` is installed, report.html. To continue an
    interrupted validation, run the same command again.

    \b
    Example:
      mpdsgr validate bundles/digits --report reports/digits
      mpdsgr validate bundles/digits --precision int8 --tier release --report reports/int8
    """
    if url is None:
        refuse_ignored("mpdsgr validate without --url", "rate")
    else:
        refuse_ignored("--url", "backend")
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
        click.echo(f"  {name}: {NOT_COMPARED} with the reference, which was not attacked in this way")
