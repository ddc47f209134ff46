"""Tables in Markdown, and pages written to disk with their pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpdsgr_deploy.atomic_files import write_atomic


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. columns: the headings; rows: the cells of each row, one per column."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def publish(page: Path, text: str, pictures: Mapping[str, bytes]) -> Path:
    """Write the text of a page and, beside it, pictures by file name; return the page's path."""
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomic(page.with_name(name), picture)
    write_atomic(page, text.encode())
    return page
