"""Write files atomically, and hash them."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mpdsgr_deploy.errors import InputError


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, reassurance: str) -> Iterator[None]:
    """Turn the operating system's errors while writing `path` into InputError with advice.

    reassurance: a clause for the message, on what is not lost when the disk is full.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG)
        advice = f"free some space and run again; {reassurance}" if full else "choose another place"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def followed(path: Path) -> Path:
    """Resolve links to an absolute path. Raises InputError for links in a circle."""
    try:
        target = path.resolve()
        if target.is_symlink():  # Python 3.13 returns False where earlier versions raise
            raise RuntimeError
    except RuntimeError:
        raise InputError(f"cannot write {path}: its symbolic links form a circle; choose another place") from None
    return target


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe, a terminal or another device, which is written to and not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def complete_file(path: Path, temporary: Path, reassurance: str) -> Iterator[BinaryIO]:
    """Write `temporary`, which replaces `path` once it is complete and on disk; an exception removes it.

    Raises InputError as `writing` does.
    """
    with writing(path, reassurance):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, so that `path` holds the old content or all of the new, whenever the process dies.

    A symbolic link is followed, not replaced; a pipe or a device is written to directly. Raises InputError if the disk
    is full or the path cannot be written; the old file is then untouched, as it is when the block raises.
    """
    path = followed(path)
    if is_stream(path):
        with writing(path, "its reader has received the first part"), path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.tmp")  # always the same name, so that killed runs leave at most one file
    with complete_file(path, temporary, "the earlier file is unchanged") as file:
        yield file


def _sync_directory(path: Path) -> None:
    """Make a renaming in a directory survive a power cut. Does nothing on Windows, which has no such call."""
    if os.name == "nt":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)
