"""Write pages in Markdown, their tables, and their pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpdsgr_deploy.atomic_files import write_atomic


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of columns, each with a cell per row."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def publish(page: Path, text: str, pictures: Mapping[str, bytes]) -> Path:
    """Write a page, and beside it the pictures, given by file name. Returns the page's path."""
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_atomic(page.with_name(name), picture)
    write_atomic(page, text.encode())
    return page
