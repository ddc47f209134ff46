"""mpdsgr demo"""

from pathlib import Path

import click

from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe
from mpdsgr_deploy.validation.report import EXIT_CODES, Report, claim_report, write_report

RECIPES = {"REG": "digits-reg", "MPD-SGR": "digits-mpdsgr"}
SHOWN = ("clean", "gaussian", "uniform", "fgsm", "pgd-strong", "worst")


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@json_option
@click.pass_context
def command(ctx: click.Context, out: Path, as_json: bool) -> None:
    """The whole path on real images in under three minutes on a CPU: train, export, validate.

    Trains a network without a defence (REG) and one with MPD-SGR on scikit-learn's digits with the same seed and
    budget, exports both to ONNX and attacks both. A finished or interrupted demo in --out is continued.

    \b
    Example:
      mpdsgr demo
    """
    need("lightning.fabric", "train")
    from mpdsgr_deploy.bundle import open_bundle
    from mpdsgr_deploy.exporting import export
    from mpdsgr_deploy.training import train
    from mpdsgr_deploy.validation import Target, validate

    origins: dict[str, str] = {}
    reports: dict[str, Report] = {}
    pages: dict[str, Path] = {}
    for method, name in RECIPES.items():
        folder = out / name
        claim_report(folder / "report")
        train(load_recipe(find_recipe(name)), folder / "run", resume=True)
        bundle = export(folder / "run", folder / "bundle")
        origins[method] = bundle.manifest.provenance["checkpoint"]
        target = Target(open_bundle(folder / "bundle"))
        reports[method] = validate(target, report_dir=folder / "report")
        pages[method] = write_report(reports[method], folder / "report")
    if as_json:
        print_json({method: report.model_dump() for method, report in reports.items()})
    else:
        print_demo(reports)
        for method, page in pages.items():
            click.echo(f"{method}: {reports[method].verdict.upper()}, {origins[method]}, report in {page}")
    ctx.exit(max(EXIT_CODES[report.verdict] for report in reports.values()))


def print_demo(reports: dict[str, Report]) -> None:
    """Accuracy of every network under the shown conditions."""
    first = next(iter(reports.values()))
    table = []
    for method, report in reports.items():
        rows = {row.name: row for row in report.rows}
        for network, scores in (
            ("torch", [rows[name].reference for name in SHOWN]),
            ("ONNX", [rows[name].artefact for name in SHOWN]),
        ):
            table.append((method, network, *(f"{100 * score.accuracy:.1f}" if score else "-" for score in scores)))
    print_table(("training", "network", *SHOWN), table, f"accuracy in %, {first.images}, seed {first.seed}")
