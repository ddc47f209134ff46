"""Write a report as report.json, junit.xml, summary.md, badge.json and, for people, report.html."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.validation import summary
from mpdsgr_deploy.validation.report import PAGE, PROGRESS, REPORT, SUMMARY, Report


@contextmanager
def report_directory(directory: Path) -> Iterator[None]:
    """Reserve a directory for one report during the block, in which the measurement may take hours.

    Raises InputError before the block if the directory holds other files or another process writes a report there.
    """
    claim_directory(directory, REPORT, "report", partial=PROGRESS)
    with exclusive(directory / LOCK, "report"):
        yield


def write_report(report: Report, directory: Path) -> Path:
    """Write all files into `directory`; return the one to read, report.html, or summary.md if that is not `drawable`.

    report.json is written last, because it marks the directory as complete. Raises InputError for a full disk.
    """
    write_atomic(directory / SUMMARY, summary.summary(report).encode())
    write_atomic(directory / "junit.xml", summary.junit(report))
    write_atomic(directory / "badge.json", summary.badge(report))
    best = directory / SUMMARY
    if drawable():
        from mpdsgr_deploy.validation.report_page import page

        best = directory / PAGE
        write_atomic(best, page(report).encode())
    else:
        (directory / PAGE).unlink(missing_ok=True)  # a page of an earlier run would contradict the new files
    write_atomic(directory / REPORT, report.model_dump_json(indent=1).encode())
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    return best


def drawable() -> bool:
    """Whether jinja2 and matplotlib, which only report.html needs, are installed; logs a warning if not."""
    try:
        need("jinja2", "report")
        need("matplotlib", "report")
    except InputError:
        log.warning(
            "report.html was not written, because it needs jinja2 and matplotlib; install them with: pip install "
            "'mpdsgr-deploy[report]'"
        )
        return False
    return True
