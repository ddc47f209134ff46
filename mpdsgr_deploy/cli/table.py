"""mpdsgr table"""

import sys
from pathlib import Path

import click

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.cli.ignored import refuse_all_but, refuse_ignored
from mpdsgr_deploy.cli.measuring import Measuring, measuring
from mpdsgr_deploy.cli.output import print_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments.table import RowSpec, TableSpec, built_in_tables, load_table
from mpdsgr_deploy.lookup import need


@click.command("table")
@click.argument("name", required=False)
@click.argument("rows", nargs=-1)
@measuring
@click.option(
    "--flips", is_flag=True, help="Instead count the spikes of the trained networks that change in each precision."
)
@click.option(
    "--images", type=click.IntRange(1), default=500, show_default=True, help="Number of test images for --flips."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Stop after this many minutes; the same command continues later.",
)
@click.option(
    "--from",
    "from_reports",
    is_flag=True,
    help="Instead print a leaderboard of validation reports, whose paths replace NAME and ROWS.",
)
@click.option(
    "--pack", type=click.Path(path_type=Path), help="Also pack results and networks as tar files into this directory."
)
def command(
    name: str | None,
    rows: tuple[str, ...],
    how: Measuring,
    flips: bool,
    images: int,
    minutes: float | None,
    from_reports: bool,
    pack: Path | None,
) -> None:
    """Train and attack the networks of a table, and write its page.

    NAME is a table that `mpdsgr table` without arguments lists, or a .toml file. ROWS are titles of its rows; without
    them all rows are measured. Earlier results are kept, an interrupted measurement continues, and a row whose recipe
    has changed is measured again.

    \b
    Example:
      mpdsgr table digits --jobs 2
      mpdsgr table cifar10 cifar10-vgg11-reg --seeds 0 --root /data
      mpdsgr table --from reports/reg reports/robust > leaderboard.md
    """
    if from_reports:
        refuse_all_but("--from", "name", "rows", "from_reports")
        from mpdsgr_deploy.experiments.leaderboard import read_report, render

        if name is None:
            raise InputError("--from takes validation reports: report.json, or the directory it lies in")
        click.echo(render([read_report(Path(path)) for path in (name, *rows)]), nl=False)
        return
    if name is None:
        tables = {stem: load_table(stem)[1] for stem in built_in_tables()}
        refuse_all_but("mpdsgr table without NAME", "render_only", *(["out"] if how.render_only else []))
        if how.render_only:
            for stem in how.measured(tables):
                write_pages(stem, tables[stem], how)
        else:
            print_table(("table", "what it is"), [(stem, table.title) for stem, table in tables.items()])
        return
    how.refuse_ignored("minutes", "images", runs=pack is not None)
    if flips:
        refuse_ignored("--flips", "jobs", "minutes")
    else:
        refuse_ignored("mpdsgr table without --flips", "images")
    stem, table = load_table(name)
    chosen = [table.row(title) for title in rows] or list(table.rows)
    need("lightning_fabric", "train")
    need("matplotlib", "report")
    code = 0
    if minutes is not None:
        code = run_for(minutes, name, rows, how)
    elif flips:
        count_flips(stem, table, chosen, how, images)
    else:
        code = how.update(stem, table, chosen)
        write_pages(stem, table, how)
    if pack is not None:
        from mpdsgr_deploy.experiments.packing import pack as pack_results

        pack_results(stem, runs=how.runs, results=how.results, out=pack)
    sys.exit(code)


def write_pages(stem: str, table: TableSpec, how: Measuring) -> None:
    """Write the page of a table, and its short form to the READMEs of a checkout that show it."""
    from mpdsgr_deploy.experiments.records import load_measured
    from mpdsgr_deploy.experiments.table_page import quote, write_page

    folder = how.results / stem
    click.echo(f"page in {write_page(stem, table, folder)}")
    train = how.results.parent
    if how.out is None and train.name == "train":
        measured = load_measured(table, folder)
        for readme in filter(Path.exists, (train / "README.md", train.parent / "README.md")):
            write_atomic(readme, quote(stem, measured, readme.read_text(encoding="utf-8")).encode())


def count_flips(stem: str, table: TableSpec, rows: list[RowSpec], how: Measuring, images: int) -> None:
    """Count the spikes that flip in each precision, and write the page about them."""
    from mpdsgr_deploy.experiments import flips_page
    from mpdsgr_deploy.experiments.flip_measurement import measure_flips
    from mpdsgr_deploy.experiments.flip_records import FOLDER

    folder = how.results / FOLDER
    if not how.render_only:
        measure_flips(how.runs_of(stem, table, rows), folder, images)
    click.echo(f"page in {flips_page.write_page(folder)}")


def run_for(minutes: float, name: str, rows: tuple[str, ...], how: Measuring) -> int:
    """Measure the rows in a child process, which is ended when the time is up. Returns its exit code, or 0."""
    from mpdsgr_deploy.experiments.jobs import run_limited

    options = {"--runs": how.runs, "--root": how.root, "--out": how.out, "--jobs": how.jobs, "--seeds": how.seeds}
    arguments = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    child = [sys.executable, "-m", "mpdsgr_deploy", "table", name, *rows, *arguments]
    return run_limited(child, 60 * minutes) or 0
