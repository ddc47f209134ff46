"""What subcommands share: options, the argument that names a bundle, JSON output, and tables for people."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpdsgr_deploy.address import local_copy, parse_address
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.signing.trust import Trust

NARROWEST = 16  # smallest width of a folded cell, in characters

precision_option = click.option(
    "--precision",
    help="Which of the bundle's networks to use: fp32, fp16, int8 or fp8.  [default: the one of BUNDLE@PRECISION, else "
    "fp32]",
)
overrides_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, such as limits.batch=128; may be repeated.",
)
signature_option = click.option(
    "--require-signature",
    "signature",
    metavar="KEY",
    envvar="MPDSGR_REQUIRE_SIGNATURE",
    help="Refuse bundles without a valid signature by KEY: a file with a public key or with certificates, or "
    "IDENTITY,ISSUER of Sigstore.",
)
verdict_option = click.option(
    "--require-verdict",
    "least_tier",
    metavar="TIER",
    envvar="MPDSGR_REQUIRE_VERDICT",
    help="Refuse bundles that lack a verdict, signed by the KEY of --require-signature, that they passed validation in "
    "this tier or a harder one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")


def opened_bundle(text: str, precision: str | None, trust: Trust | None = None) -> tuple[Bundle, str]:
    """Open BUNDLE[@PRECISION][@sha256:DIGEST]; return the bundle, and the precision that it or --precision names.

    precision: the option --precision; trust: who must have signed the bundle. Raises InputError as `open_bundle` does,
    and if the two name different precisions.
    """
    address = parse_address(text)
    if precision is not None and address.precision not in (None, precision):
        raise InputError(f"{text!r} and --precision {precision} name two precisions; leave one out")
    return open_bundle(local_copy(address), trust), precision or address.precision or "fp32"


def opened_precisions(text: str, options: Sequence[str] = (), trust: Trust | None = None) -> tuple[Bundle, list[str]]:
    """Open BUNDLE as `opened_bundle` does; return the bundle, and the precisions that are named, or else all it has.

    options: the values of --precision. Raises InputError if BUNDLE names one too.
    """
    named = parse_address(text).precision
    if named is not None and options:
        raise InputError(f"{text!r} and --precision name precisions; leave one of them out")
    bundle, _ = opened_bundle(text, None, trust)
    return bundle, [named] if named is not None else list(options or bundle.manifest.variants)


def print_json(value: Any) -> None:
    """Print a value as JSON, in one line, with null for NaN and infinity, which JSON does not have."""
    click.echo(json.dumps(_strict(value), allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """Print rows as a table for people.

    On a terminal the table has borders, and cells of wide columns are folded; if it is too narrow for that, each row
    becomes a block of lines. In pipes and logs each row is one plain line.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    least = widths[0] + sum(min(width, NARROWEST) for width in widths[1:]) + 3 * len(columns) + 1  # with borders
    on_terminal, console = sys.stdout and sys.stdout.isatty(), Console()
    if on_terminal and least <= console.width:
        console.print(_table(columns, cells, widths, title))
        return
    if title:
        click.echo(title)
    if on_terminal:
        _print_blocks(columns, cells)
    else:
        for row in (columns, *cells):
            click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int], title: str | None) -> Table:
    table = Table(title=title and Text(title), title_justify="left")
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        least_width = None if number == 0 else min(width, NARROWEST)
        table.add_column(Text(column), overflow="fold", no_wrap=number == 0, min_width=least_width)
    for row in cells:
        table.add_row(*map(Text, row))  # as Text, because rich takes square brackets in strings for markup
    return table


def print_sentence(text: str) -> None:
    """Print a text for people, in one line or, on a terminal, broken between words."""
    click.echo(click.wrap_text(text, Console().width) if sys.stdout and sys.stdout.isatty() else text)


def _print_blocks(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    for row in cells:
        click.echo(row[0])
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                click.echo(f"  {column}: {cell}" if column else f"  {cell}")
