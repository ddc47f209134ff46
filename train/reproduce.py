"""Reproduce a table: train and evaluate its rows, write one results file each, render the page.

    python train/reproduce.py digits --jobs 2                     every row and seed of train/tables/digits.toml
    python train/reproduce.py cifar10 cifar10-vgg11-sr --seeds 0  one row, one seed
    python train/reproduce.py digits --render-only                the page from the results there are

What is finished is kept, what was interrupted continues, what was measured with another recipe is measured again. Where
the project's README quotes a table, its short form there is rendered too.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from functools import partial, reduce, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from table import Artefact, Row, Table, load_table

from mpdsgr_deploy.cli import OneLineErrors
from mpdsgr_deploy.errors import InputError, MpdsgrError
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log, show_progress
from mpdsgr_deploy.recipe import Recipe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One row with one seed, and where its things lie. `sender`: whose attacked images it is tried with."""

    table: str
    row: str
    recipe: Recipe
    artefact: Artefact | None
    tier: str | None
    sender: "Run | None"
    runs: Path
    root: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.row}, seed {self.recipe.training.seed}"


Task = Callable[[Run], MpdsgrError | None]


@dataclass(frozen=True)
class How:
    """What a command that measures rows with seeds is asked for: its options."""

    runs: Path
    root: str
    seeds: str | None
    jobs: int
    out: Path
    render_only: bool

    def measure(self, name: str, table: Table, rows: Sequence[Row]) -> list[tuple["Run", MpdsgrError]]:
        """Bring the results of the rows up to date, unless only pages are wanted. Returns what failed."""
        if self.render_only:
            return []
        seeds = table.seeds if self.seeds is None else parse_seeds(self.seeds)
        folder = self.out / name
        return reproduce(outdated(name, table, rows, seeds, runs=self.runs, root=self.root, folder=folder), self.jobs)


OPTIONS = (
    click.option(
        "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Training runs."
    ),
    click.option("--root", default="data", show_default=True, help="Where the data set lies."),
    click.option("--seeds", metavar="0,1,..", help="Train with these seeds.  [default: those that it names]"),
    click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time."),
    click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Results.  [default: train/results]"),
    click.option("--render-only", is_flag=True, help="Measure nothing, render the page from the results there are."),
)


def measuring(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that measures rows with seeds, given to it as `how`."""

    @wraps(command)
    def bundled(**given: Any) -> None:
        how = How(**{field.name: given.pop(field.name) for field in fields(How)})
        command(how=how, **given)

    return reduce(lambda wrapped, option: option(wrapped), reversed(OPTIONS), bundled)


@click.command(cls=OneLineErrors)
@click.argument("table")
@click.argument("rows", nargs=-1)
@measuring
@click.pass_context
def main(ctx: click.Context, table: str, rows: tuple[str, ...], how: How) -> None:
    """Train and evaluate the ROWS (all without any) of TABLE, a name in train/tables or a .toml file."""
    show_progress()
    name, found = load_table(table)
    chosen = [found.row(title) for title in rows] or found.rows
    need("torch", "train")
    need("matplotlib", "report")
    from page import load_results, quote, write_page

    failures, folder = how.measure(name, found, chosen), how.out / name
    click.echo(f"page in {write_page(name, found, folder)}")
    if how.out == RESULTS:
        readme = RESULTS.parent / "README.md"
        quoted = quote(name, load_results(found, folder), readme.read_text(encoding="utf-8"))
        write_atomic(readme, quoted.encode())
    ctx.exit(told(failures))


def told(failures: Sequence[tuple["Run", MpdsgrError]]) -> int:
    """Say what failed; the exit code."""
    for run, error in failures:
        click.echo(f"error: {run}: {error}", err=True)
    return max((error.exit_code for _, error in failures), default=0)


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"--seeds {text!r}: write whole numbers with commas, for example 0,1,2") from None


def outdated(
    name: str, table: Table, rows: Sequence[Row], seeds: Sequence[int], *, runs: Path, root: str, folder: Path
) -> list[Run]:
    """The runs whose results are not there yet, or were measured with another recipe; seed by seed."""
    from result import read_result, result_path

    todo = []
    for seed in seeds:
        for row in rows:
            sender = table.source(row, seed)
            of = partial(Run, name, artefact=table.artefact, tier=table.tier, runs=runs, root=root, folder=folder)
            sends = None if sender is None else of(sender[0].title, sender[1], sender=None)
            run = of(row.title, table.recipe(row, seed), sender=sends)
            path = result_path(folder, row.title, seed)
            if path.exists():
                try:
                    read_result(path, table)
                    continue
                except InputError as error:
                    log.warning("again: %s", error)
            todo.append(run)
    return todo


def reproduce(todo: list[Run], jobs: int) -> list[tuple[Run, MpdsgrError]]:
    """Measure all, after the networks are trained whose attacked images they are tried with. Returns what failed."""
    senders = {str(run.sender): run.sender for run in todo if run.sender is not None}
    failures = work([*senders.values()], jobs, prepare)
    failed = {str(run) for run, _ in failures}
    left_out = [run for run in todo if str(run.sender) in failed]
    failures += [(run, InputError(f"not measured, since {run.sender} failed")) for run in left_out]
    return failures + work([run for run in todo if run not in left_out], jobs, attempt)


def work(todo: list[Run], jobs: int, task: Task) -> list[tuple[Run, MpdsgrError]]:
    """Do a task for all; says after each how many are done and how long the rest may take. Returns what failed."""
    failures: list[tuple[Run, MpdsgrError]] = []
    if not todo:
        return failures
    started = time.monotonic()
    log.info("%d runs to %s, %d at a time", len(todo), task.__name__, jobs)
    for number, (run, error) in enumerate(finished(todo, jobs, task), 1):
        if error is not None:
            failures.append((run, error))
        left = (time.monotonic() - started) / number * (len(todo) - number)
        log.info(
            "%d of %d: %s %s; about %.0f min left", number, len(todo), run, "FAILED" if error else "done", left / 60
        )
    return failures


def finished(todo: list[Run], jobs: int, task: Task) -> Iterator[tuple[Run, MpdsgrError | None]]:
    """The runs as they finish, each with what went wrong."""
    if jobs == 1:
        yield from ((run, task(run)) for run in todo)
        return
    # read by torch and BLAS when a new process loads them: together the processes use each core once
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=die_on_interrupt) as pool:
        pending = {pool.submit(task, run): run for run in todo}
        try:
            for future in as_completed(pending):
                if crash := future.exception():  # what it is follows once the pool has shut down
                    log.error("%s: %s; waiting for what is under way", pending[future], type(crash).__name__)
                yield pending[future], future.result()
        except BrokenProcessPool:
            raise InputError("a run's process was killed, perhaps for memory; start again with fewer --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


def die_on_interrupt() -> None:
    """A worker leaves what to say and do on Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepare(run: Run) -> MpdsgrError | None:
    """Train one run; returns the error that others need not suffer from."""
    from measure import trained

    return without_raising(lambda: trained(run.table, run.row, run.recipe, runs=run.runs, root=run.root))


def attempt(run: Run) -> MpdsgrError | None:
    """Train and measure one run; returns as `prepare`."""
    from measure import measure, run_directory

    sender = run.sender and run_directory(run.runs, run.table, run.sender.row, run.sender.recipe)
    return without_raising(
        lambda: measure(
            run.table,
            run.row,
            run.recipe,
            artefact=run.artefact,
            tier=run.tier,
            transfer=sender,
            runs=run.runs,
            root=run.root,
            folder=run.folder,
        )
    )


def without_raising(task: Callable[[], object]) -> MpdsgrError | None:
    """Do it, on a CPU with memory pages kept; returns an error of ours."""
    from mpdsgr_deploy.training.pages import keep_pages

    keep_pages()
    try:
        task()
    except MpdsgrError as error:
        return error
    return None


if __name__ == "__main__":
    main()
