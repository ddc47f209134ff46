"""Select the inputs of a run: those listed in a file, or one share of them if several machines share the job."""

import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.stores import Place, opened, place_of

Item = TypeVar("Item")


class Shard(NamedTuple):
    """Share `number`, counted from 1, of `total` equal shares."""

    number: int
    total: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this share of the items. Shares are contiguous, so all shares in order are all items."""
        start, stop = (len(items) * part // self.total for part in (self.number - 1, self.number))
        return items[start:stop]


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """Parse a text such as "2/8", the second of eight shares. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text!r}: write it as NUMBER/TOTAL, from 1/8 to 8/8 for example")
    return Shard(int(match[1]), int(match[2]))


def read_list(file: Place) -> list[Place]:
    """Read paths and addresses from a text file, one per line; "-" is standard input. Blank lines are ignored.

    Paths are relative to the working directory. Raises InputError for a file that cannot be read or names nothing,
    StoreError for a store that cannot be reached.
    """
    try:
        if str(file) == "-":
            content = sys.stdin.buffer.read()
        else:
            with opened(file) as source:
                content = source.read()
    except OSError as error:
        raise InputError(f"cannot read --list {file}: {error.strerror}") from None
    # file names need not be UTF-8
    paths = [place_of(os.fsdecode(line)) for line in content.splitlines() if line.strip()]
    if not paths:
        raise InputError(f"--list {file} names no inputs")
    return paths
