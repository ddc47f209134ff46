"""Progress: a bar on a terminal, plain lines in a log, and nothing unless `show_progress` was called."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
log = logging.getLogger("mpdsgr_deploy")
LINE_EVERY = 10.0  # seconds between two lines of `predicting`


def show_progress() -> None:
    """Show the package's log lines and progress bars on stderr. The `mpdsgr` command calls this; a library does not."""
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler: logging.Handler
        if sys.stderr.isatty():
            handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, show_time=False)
        else:
            handler = logging.StreamHandler()
        log.addHandler(handler)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, with a progress bar if `show_progress` was called and stderr is a terminal.

    what: the bar's description. total: the number of items, for iterables without a length.
    """
    if not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield from items
        return
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=what)


@contextmanager
def predicting(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of images predicted since the last call, from `done` to `total`.

    Count and speed are shown by a bar on a terminal, else by a log line every LINE_EVERY seconds.
    """
    start, last, first = time.monotonic(), time.monotonic(), done

    def speed() -> str:
        return f"{(done - first) / max(time.monotonic() - start, 1e-9):.0f} images/s"

    def line(more: int) -> None:
        nonlocal done, last
        done += more
        if done == total or time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            log.info("predicting: %d of %d images, %s", done, total, speed())

    if not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("predicting", total=total, completed=done, speed="")

        def advance(more: int) -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done, speed=speed())

        yield advance
