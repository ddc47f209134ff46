"""mpdsgr study"""

import sys

import click

from mpdsgr_deploy.cli.ignored import refuse_all_but, refuse_ignored
from mpdsgr_deploy.cli.measuring import Measuring, measuring
from mpdsgr_deploy.cli.output import print_table
from mpdsgr_deploy.experiments.study import PREFIX, Study, built_in_studies, load_study
from mpdsgr_deploy.lookup import need


@click.command("study")
@click.argument("name", required=False)
@click.argument("rows", nargs=-1)
@measuring
@click.option(
    "--why",
    is_flag=True,
    help="Instead measure how perturbations and gradients pass through the trained networks of the rows.",
)
@click.option(
    "--images", type=click.IntRange(1), default=200, show_default=True, help="Number of test images for --why."
)
def command(name: str | None, rows: tuple[str, ...], how: Measuring, why: bool, images: int) -> None:
    """Compare training methods in several settings, and write a page.

    NAME is a study that `mpdsgr study` without arguments lists, or a .toml file. ROWS are names of settings, or
    SETTING.METHOD for a single method; without them everything is measured. Earlier results are kept, an interrupted
    measurement continues, and a row whose recipe has changed is measured again.

    \b
    Example:
      mpdsgr study digits depth-7 --seeds 0 --jobs 2
      mpdsgr study digits base at --why
    """
    if name is None:
        refuse_all_but("mpdsgr study without NAME", "render_only", *(["out"] if how.render_only else []))
        studies = dict(load_study(own) for own in built_in_studies())
        if how.render_only:
            for stem in (stem for stem in studies if (how.results / stem).is_dir()):
                write_pages(stem, studies[stem], how)
        else:
            print_table(("study", "what it asks"), [(s.removeprefix(PREFIX), v.title) for s, v in studies.items()])
        return
    how.refuse_ignored("why", "images", runs=False)
    if why:
        refuse_ignored("--why", "jobs")
    else:
        refuse_ignored("mpdsgr study without --why", "images")
    stem, study = load_study(name)
    chosen = study.chosen(rows)
    need("lightning_fabric", "train")
    code = 0
    if not why:
        code = how.update(stem, study.table(), chosen)
    else:
        from mpdsgr_deploy.experiments.explain import explain_runs

        explain_runs(how.runs_of(stem, study.table(), chosen), images)
    write_pages(stem, study, how)
    sys.exit(code)


def write_pages(stem: str, study: Study, how: Measuring) -> None:
    """Write the page of a study, unless only --why was measured, and the page of --why, if there are records of it."""
    need("matplotlib", "report")
    from mpdsgr_deploy.experiments import explain, study_page, variants, why_page
    from mpdsgr_deploy.experiments.record_files import RECORDS

    assert variants.DEPTHS  # imported because it registers what the recipes of studies name
    folder = how.results / stem
    recorded, explained = ((folder / name).exists() for name in (RECORDS, explain.RECORDS))
    if recorded or not explained:
        click.echo(f"page in {study_page.write_page(stem, study, folder)}")
    if explained:
        click.echo(f"page in {why_page.write_why(study, folder)}")
