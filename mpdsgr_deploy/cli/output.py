"""What subcommands share: the --json switch and a table on stdout."""

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")


def print_json(value: Any) -> None:
    """One machine-readable object on stdout."""
    click.echo(json.dumps(value))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table for people on stdout; long cells fold instead of being cut, except the first column's names."""
    table = Table(title=title and Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: square brackets are ours, not rich's markup
    Console().print(table)
