"""Pages in Markdown: their tables, and how they are written beside their pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpdsgr_deploy.files import write_atomic


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of columns with a cell of each row."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def publish(page: Path, text: str, pictures: Mapping[str, bytes]) -> Path:
    """Write a page, and beside it the pictures by the names of their files. Returns the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomic(page.with_name(name), picture)
    write_atomic(page, text.encode())
    return page
