"""When does lowering Omega help? One factor at a time around a small setting, every method beside its baseline.

    python train/study/study.py digits --jobs 2              every run of train/study/digits.toml, and the page
    python train/study/study.py digits depth-7 --seeds 0     one setting, one seed
    python train/study/study.py digits base.reg              one method in one setting
    python train/study/study.py digits --render-only         the page from the results there are

A study names methods and settings; each setting is run with each method, and the first method is what the others are
held against. Its runs are rows of a table and are measured as those are; `reproduce.py` says what is kept.
"""

import sys
from pathlib import Path

import click

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))

import variants  # noqa: E402, F401  (registered in worker processes as well)
from reproduce import How, measuring, told  # noqa: E402
from study_table import load_study  # noqa: E402

from mpdsgr_deploy.cli import OneLineErrors  # noqa: E402
from mpdsgr_deploy.progress import show_progress  # noqa: E402


@click.command(cls=OneLineErrors)
@click.argument("study")
@click.argument("rows", nargs=-1)
@measuring
@click.pass_context
def main(ctx: click.Context, study: str, rows: tuple[str, ...], how: How) -> None:
    """Run ROWS (settings or SETTING.METHOD; all without any) of STUDY, a name in train/study or a .toml file."""
    from study_page import write_page

    show_progress()
    name, found = load_study(study)
    failures = how.measure(name, found.table(), found.chosen(rows))
    click.echo(f"page in {write_page(name, found, how.out / name)}")
    ctx.exit(told(failures))


if __name__ == "__main__":
    main()
