"""What a network keeps once it is exported: attacked as the paper attacks, attacked strongly, in float32 and in int8.

    python export/robustness.py runs/reg runs/at --root data       export, validate in tier release, render the page
    python export/robustness.py --render-only                      the page from the results there are

RUNS are directories of `mpdsgr train`. What is finished is kept, what was interrupted goes on where it stopped. The
results are the reports of `mpdsgr validate` without their pictures.
"""

from pathlib import Path

import click

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.cli import OneLineErrors
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log, show_progress
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.report import Report, percent

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("fp32", "int8")
TIER = "release"
MAX_DROP = 0.02  # what 500 images can decide


@click.command(cls=OneLineErrors)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--root", default="data", show_default=True, help="Where the data set lies.")
@click.option("--limit", default=500, show_default=True, help="Test images, the first so many.")
@click.option("--bundles", type=click.Path(path_type=Path), default=Path("bundles"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Results.  [default: export/results]")
@click.option("--render-only", is_flag=True, help="Measure nothing, render the page from the results there are.")
def main(runs: tuple[Path, ...], root: str, limit: int, bundles: Path, out: Path, render_only: bool) -> None:
    """Export, validate and tabulate RUNS."""
    show_progress()
    for run in () if render_only else runs:
        measure(run, bundles / run.name, out, root=root, limit=limit)
    reports = [Report.model_validate_json(path.read_bytes()) for path in sorted(out.glob("*.json"))]
    write_atomic(out / "README.md", page(reports).encode())
    click.echo(f"page in {out / 'README.md'}")


def measure(run: Path, bundle: Path, out: Path, *, root: str, limit: int) -> None:
    """The results of one run, those that are not there yet."""
    todo = [precision for precision in PRECISIONS if not (out / f"{run.name}-{precision}.json").exists()]
    if not todo:
        return
    if not (bundle / "manifest.json").exists():
        need("onnxscript", "train")
        from mpdsgr_deploy.exporting import export

        export(run, bundle, precisions=["int8"], root=root, limit=limit, tier=TIER)
    for precision in todo:
        log.info("%s, %s", run.name, precision)
        kept = bundle.with_name(f"{bundle.name}-{precision}")
        report = validate(
            Target(open_bundle(bundle), precision=precision), gate=Gate(tier=TIER, max_drop=MAX_DROP), report_dir=kept
        )
        slim = report.model_copy(update={"examples": []})
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{run.name}-{precision}.json", slim.model_dump_json(indent=1).encode())


COLUMNS = {"clean": "clean", "fgsm": "FGSM", "pgd": "PGD, paper", "pgd-strong": "PGD, strong", "worst": "union"}


def page(reports: list[Report]) -> str:
    """Markdown: a table, what was measured on what, and how each verdict fell."""
    lines = [
        "# Robustness of exported networks",
        "",
        "Accuracy in % with 95 % Wilson intervals, measured on the ONNX files by `export/robustness.py`. *PGD, paper*",
        "is the paper's setting (7 steps of 0.01, last iterate), *PGD, strong* 40 steps of eps/4 of which any iterate",
        "counts, *union* what survives every attack within eps: strong PGD through five surrogates, APGD-CE, APGD-DLR,",
        "Square and, for int8, images made on the float32 network. [What it shows](FINDINGS.md).",
        "",
        f"| network | precision | {' | '.join(COLUMNS.values())} | torch's union | strongest attack | verdict |",
        "|---|---|" + "---|" * (len(COLUMNS) + 3),
    ]
    for report in reports:
        rows = {row.name: row for row in report.rows}
        attacks = [row for row in report.rows if row.eps and row.name != "worst"]
        strongest = min(attacks, key=lambda row: row.artefact.correct)
        shown = [percent(rows[name].artefact) if name in rows else "-" for name in COLUMNS]
        worst = rows["worst"].reference
        reference = f"{100 * worst.accuracy:.1f}" if worst else "-"
        found = f"{strongest.name} {100 * strongest.artefact.accuracy:.1f}"
        name = report.network.partition("trained with ")[2].partition(",")[0]
        cells = [name, report.precision, *shown, reference, found, report.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *sorted({_setting(report) for report in reports}), ""]
    return "\n".join(lines)


def _setting(report: Report) -> str:
    made = report.provenance
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    where = f"{made['hardware']['cpu']}, {made['hardware']['cores']} cores"
    network = report.network.partition(", trained with")[0]
    return f"- {network}: {report.images}, tier {report.tier}, seed {report.seed}; {where}; {packages}."


if __name__ == "__main__":
    main()
