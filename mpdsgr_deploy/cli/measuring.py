"""The options that `mpdsgr table` and `mpdsgr study` share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.number_list import number_list
from mpdsgr_deploy.experiments.table import RowSpec, TableSpec
from mpdsgr_deploy.recipes import shipped

if TYPE_CHECKING:
    from mpdsgr_deploy.experiments.table_run import Run

OPTIONS = (
    click.option("--seeds", metavar="0,1,..", help="Seeds to train with.  [default: those of the file]"),
    click.option(
        "--jobs",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of trainings to run at the same time.",
    ),
    click.option(
        "--runs",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="Directory for the training runs.",
    ),
    click.option("--root", default="data", show_default=True, help="Directory of the data set."),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Directory for the results.  [default: train/results in a checkout, else results]",
    ),
    click.option(
        "--render-only", is_flag=True, help="Only write the page from earlier results; without NAME every page."
    ),
)


@dataclass(frozen=True)
class Measuring:
    """The values of the options that measuring commands share."""

    seeds: str | None
    jobs: int
    runs: Path
    root: str
    out: Path | None
    render_only: bool

    @property
    def results(self) -> Path:
        shipped_results = shipped("train") / "results"
        return self.out or (shipped_results if shipped_results.is_dir() else Path("results"))

    def refuse_ignored(self, *further: str, runs: bool) -> None:
        """Raise InputError for options and ROWS that --render-only, if it is set, ignores.

        further: those of the command. runs: whether it uses --runs all the same.
        """
        if self.render_only:
            refuse_ignored("--render-only", "rows", "seeds", "jobs", "root", *([] if runs else ["runs"]), *further)

    def runs_of(self, name: str, table: TableSpec, rows: Sequence[RowSpec]) -> "list[Run]":
        """Return the runs of a table's rows. Raises InputError unless --seeds is a list of whole numbers."""
        from mpdsgr_deploy.experiments.jobs import runs_of
        from mpdsgr_deploy.experiments.table_run import Places

        seeds = [] if self.seeds is None else sorted({*number_list("--seeds", self.seeds, int, "0,1,2", low=0)})
        return list(runs_of(name, table, rows, Places(self.runs, self.root, self.results), seeds))

    def measured(self, stems: Iterable[str]) -> list[str]:
        from mpdsgr_deploy.experiments.record_files import RECORDS

        return [stem for stem in stems if (self.results / stem / RECORDS).exists()]

    def update(self, name: str, table: TableSpec, rows: Sequence[RowSpec]) -> int:
        """Train and measure rows whose records are missing or outdated, unless only pages are to be written.

        Prints errors, and returns the exit code: 0, or the highest of the errors.
        """
        if self.render_only:
            return 0
        from mpdsgr_deploy.experiments.jobs import bring_up_to_date

        failures = bring_up_to_date(self.runs_of(name, table, rows), self.jobs)
        for run, error in failures:
            click.echo(f"error: {run}: {error}", err=True)
        return max((error.exit_code for _, error in failures), default=0)


def measuring(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with OPTIONS, whose values it gets as the argument `how`."""

    @wraps(command)
    def bundled(**values: Any) -> None:
        how = Measuring(**{field.name: values.pop(field.name) for field in fields(Measuring)})
        command(how=how, **values)

    return reduce(lambda wrapped, option: option(wrapped), reversed(OPTIONS), bundled)
