"""Long work shows a bar on a terminal and plain lines in a log; library users see nothing unless they ask."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress

T = TypeVar("T")
log = logging.getLogger("mpdsgr_deploy")


def show_progress() -> None:
    """Send the package's log lines to stderr and allow bars there; the `mpdsgr` command calls it once."""
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler: logging.Handler
        if sys.stderr.isatty():
            handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, show_time=False)
        else:
            handler = logging.StreamHandler()
        log.addHandler(handler)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar if `show_progress` was called and stderr is a terminal, else just iterate."""
    if not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield from items
        return
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=what)
