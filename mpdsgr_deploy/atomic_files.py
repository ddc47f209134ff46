"""Write files atomically, and hash them."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mpdsgr_deploy.errors import InputError, one_line


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, reassurance: str) -> Iterator[None]:
    """Raise errors of the operating system during the block, which writes `path`, as InputError with advice.

    reassurance: a clause for the message, which says what is not lost. An error about another file, which the block
    reads, is raised as an InputError that names that file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not _belongs_to(error.filename, path)):
            raise InputError(f"{path} was not written: {one_line(error)}; {reassurance}") from error
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG)
        advice = f"free some space and run again; {reassurance}" if full else "choose another place"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def _belongs_to(file: Any, path: Path) -> bool:
    """Whether `file` is `path`, a part of it, one of its parents, or a temporary file beside it, by their names."""
    file, path = (Path(os.path.abspath(os.fsdecode(name))) for name in (file, path))
    if path.is_relative_to(file):
        return True
    beside = file.relative_to(path.parent).parts[0] if file.is_relative_to(path.parent) else ""
    return beside == path.name or beside.startswith((f".{path.name}.", f"{path.name}."))


def followed(path: Path) -> Path:
    """Return the absolute path to which links lead. Raises InputError for links that form a circle."""
    try:
        target = path.resolve()
        if target.is_symlink():  # Python 3.13 returns False where earlier versions raise
            raise RuntimeError
    except RuntimeError:
        raise InputError(f"cannot write {path}: its symbolic links form a circle; choose another place") from None
    return target


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe, a terminal or another device, which can be written to but not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def complete_file(path: Path, temporary: Path, reassurance: str) -> Iterator[BinaryIO]:
    """Yield `temporary`, opened for writing; after the block it is flushed to disk and replaces `path`.

    An exception in the block removes it. Raises InputError as `writing` does.
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
    """Yield a file to write, so that `path` has the old or all of the new content whenever the process dies.

    Symbolic links are followed, not replaced; pipes and devices are written to directly. Raises InputError if the disk
    is full or the path cannot be written. The old file is then unchanged, as it is if the block raises.
    """
    path = followed(path)
    if is_stream(path):
        with writing(path, "its reader has received the first part"), path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name, so that killed runs leave one file at most
    with complete_file(path, temporary, "the earlier file is unchanged") as file:
        yield file


def _sync_directory(path: Path) -> None:
    """Make a renaming in a directory survive a power failure. Windows has no call for this."""
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
