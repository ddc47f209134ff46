"""Which inputs a run takes: those listed in a file, or one share of them if several machines work on the same job."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mpdsgr_deploy.errors import InputError

Item = TypeVar("Item")


class Shard(NamedTuple):
    """Share `number` (from 1) of `total` equal shares."""

    number: int
    total: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This share of the items; the shares are contiguous, so all of them in order are all items."""
        start, stop = (len(items) * part // self.total for part in (self.number - 1, self.number))
        return items[start:stop]


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """ "2/8" is the second of eight shares. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text!r}: write it as NUMBER/TOTAL, from 1/8 to 8/8 for example")
    return Shard(int(match[1]), int(match[2]))


def read_list(file: Path) -> list[Path]:
    """The paths in a text file, one per line; "-" is standard input. Blank lines are left out.

    Paths are relative to the working directory. Raises InputError for a file that cannot be read or names nothing.
    """
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read --list {file}: {error.strerror}") from None
    paths = [Path(os.fsdecode(line)) for line in content.splitlines() if line.strip()]  # names need not be UTF-8
    if not paths:
        raise InputError(f"--list {file} names no inputs")
    return paths
