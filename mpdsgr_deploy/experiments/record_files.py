"""Files of records: JSON lines, one record per line, replaced by key. Several processes may write into one file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, PlainSerializer

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.schema import parse_document

RECORDS = "results.jsonl"
DIGITS = 6  # significant digits of a measured number
R = TypeVar("R", bound=BaseModel)


def rounded(value: Any) -> Any:
    """Return a JSON-ready value whose floats are rounded to DIGITS significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


Rounded = PlainSerializer(rounded)  # annotates a field of measured numbers


def read_records(path: Path, model: type[R]) -> list[R]:
    """Return the records of a file, in its order; none if there is no file.

    Raises InputError, which names the line, as `parse_document` does.
    """
    advice = "remove the line and measure again"
    return [
        parse_document(line, model, f"{path}, line {number}", otherwise=advice)
        for number, line in enumerate(read_lines(path), 1)
    ]


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def put_record(path: Path, record: BaseModel, key: Sequence[str]) -> None:
    """Write a record into a file, in place of the one with the same values of the fields `key`, by which it is sorted.

    The file is replaced as a whole: a process that is killed leaves the old or the new one. Raises InputError if it
    cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.model_dump_json()
    with exclusive(path.parent / LOCK, "process", wait=True):
        lines = {key_of(other, key): other for other in read_lines(path)} | {key_of(line, key): line}
        write_atomic(path, "".join(f"{lines[values]}\n" for values in sorted(lines)).encode())


def key_of(line: str, key: Sequence[str]) -> tuple[Any, ...]:
    values = json.loads(line)
    return tuple(values[name] for name in key)
