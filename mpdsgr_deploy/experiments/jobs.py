"""Bring the records of a table up to date, with several runs at a time.

Finished runs are kept, interrupted ones continue, and runs that were measured with another recipe are repeated.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import zip_longest
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext

from mpdsgr_deploy.allocator import keep_pages
from mpdsgr_deploy.errors import InputError, MpdsgrError
from mpdsgr_deploy.experiments.records import outdated, records_of
from mpdsgr_deploy.experiments.table import RowSpec, TableSpec
from mpdsgr_deploy.experiments.table_run import Places, Run, measure, trained
from mpdsgr_deploy.progress import log

Task = Callable[[Run], object]
Failures = list[tuple[Run, MpdsgrError]]
GRACE = 20.0  # seconds that a process has to stop before it is killed


def bring_up_to_date(runs: Sequence[Run], jobs: int) -> Failures:
    """Measure the runs of a table whose records are missing or outdated; return those that failed, with their errors.

    jobs: how many processes measure at a time.
    """
    records = records_of(runs[0].folder)
    todo: list[Run] = []
    for run in runs:
        record = records.get((run.row, run.recipe.training.seed))
        reason = "" if record is None else outdated(record, run.table)
        if reason:
            log.warning("measuring again: %s", reason)
        if reason is not None:
            todo.append(run)
    return measure_all(todo, jobs)


def runs_of(
    name: str, table: TableSpec, rows: Sequence[RowSpec], places: Places, seeds: Sequence[int]
) -> Iterator[Run]:
    """Yield the run of each row of table `name` with each seed, all rows of a seed together.

    seeds: empty for those of the table. A row that has only the table's `start_seed` is yielded once.
    """

    def alone(row: RowSpec, seed: int) -> Run:
        """Return the run of a row without the network whose attacked images it uses."""
        init = None if row.init is None else alone(table.row(row.init), seed)
        return Run(name, table, row.title, table.recipe(row, table.seed_of(row, seed)), places, init)

    def with_sender(row: RowSpec, seed: int) -> Run:
        if row.transfer is None:
            return alone(row, seed)
        return replace(alone(row, seed), sender=alone(table.row(row.transfer), table.next_seed(seed)))

    runs = (with_sender(row, seed) for seed in seeds or table.seeds for row in rows)
    yield from {str(run): run for run in runs}.values()


def measure_all(todo: list[Run], jobs: int) -> Failures:
    """Measure all runs, after training the networks that they start from or whose attacked images they use.

    Returns the runs that failed, with their errors. A run that needs a failed one is not measured and fails too.
    """
    senders = [run.sender for run in todo if run.sender is not None]
    generations = zip_longest(*(ancestors(run) for run in (*todo, *senders)))
    inits = [[run for run in generation if run is not None] for generation in generations]
    failures: Failures = []
    for group in (*inits, senders, todo):
        failed = {str(run) for run, _ in failures}
        ready = {str(run): run for run in group if not {str(run), str(run.init), str(run.sender)} & failed}
        for run in todo if group is todo else ():
            missing = sorted({str(run.init), str(run.sender)} & failed)
            if missing:
                failures.append((run, InputError(f"it was not measured, because {missing[0]}, which it needs, failed")))
        failures += work([*ready.values()], jobs, measure if group is todo else trained)
    return failures


def ancestors(run: Run) -> list[Run]:
    """Return the chain of runs that a run starts from, first the one that starts from random weights."""
    return [] if run.init is None else [*ancestors(run.init), run.init]


def work(todo: list[Run], jobs: int, task: Task) -> Failures:
    """Do a task for every run, and log the progress with an estimate of the time left; return the failed runs."""
    failures: Failures = []
    if not todo:
        return failures
    started = time.monotonic()
    log.info("%s: %d runs, %d at a time", "measuring" if task is measure else "training", len(todo), jobs)
    for number, (run, error) in enumerate(as_finished(todo, jobs, task), 1):
        if error is not None:
            failures.append((run, error))
        seconds_left = (time.monotonic() - started) / number * (len(todo) - number)
        status = "FAILED" if error else "done"
        log.info("%d of %d: %s %s; about %.0f min left", number, len(todo), run, status, seconds_left / 60)
    return failures


def as_finished(todo: list[Run], jobs: int, task: Task) -> Iterator[tuple[Run, MpdsgrError | None]]:
    """Do a task for every run, and yield the runs in the order in which they finish, each with its error or None.

    Raises InputError if a process is killed.
    """
    if jobs == 1:
        yield from ((run, error_of(task, run)) for run in todo)
        return
    # torch and BLAS read this when a new process loads them; together, the processes have a thread per core
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with ProcessPoolExecutor(  # on Ctrl-C, workers end silently, and this process reports it
        jobs, new_processes(), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as pool:
        pending = {pool.submit(error_of, task, run): run for run in todo}
        try:
            for future in as_completed(pending):
                if crash := future.exception():  # the error is raised once the pool has shut down
                    log.error(
                        "%s: %s; waiting for the runs that are in progress", pending[future], type(crash).__name__
                    )
                yield pending[future], future.result()
        except BrokenProcessPool:
            raise InputError(
                "the process of a run was killed, perhaps because memory was short; run again with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def new_processes() -> BaseContext:
    """Return a context for processes that inherit nothing from this one, such as threads or a CUDA context.

    Where fork exists, they are forked from a process that has imported the modules of a run, which takes seconds.
    Elsewhere each process imports them.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([measure.__module__])
    return context


def error_of(task: Task, run: Run) -> MpdsgrError | None:
    """Do a task; return an error of this package instead of raising it, so that other runs go on."""
    keep_pages()
    try:
        task(run)
    except MpdsgrError as error:
        return error
    return None


def run_limited(command: Sequence[str], seconds: float) -> int | None:
    """Run a command and return its exit status. Stop it after `seconds` and return None."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            log.info("the time is up; run the same command again to continue")
            child.terminate()  # not SIGINT, which commands ignore that a shell started in the background
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
    return None
