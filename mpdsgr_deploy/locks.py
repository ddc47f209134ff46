"""Locks between processes, by files, on POSIX systems and Windows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mpdsgr_deploy.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

LOCK = ".lock"  # a directory's lock file


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Take the exclusive lock of an open file, which is released on closing; False if another process has it.

    wait: block until it is free. On a file system without locks this always succeeds.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            # lock one byte far after the content, because on Windows others cannot read a locked part
            position = file.tell()
            file.seek(2**31 - 2)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
            finally:
                file.seek(position)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def exclusive(path: Path, holder: str, *, wait: bool = False) -> Iterator[None]:
    """Hold lock file `path` for the length of the block; the file is gone after it.

    Raises InputError, which names the process that holds it as `holder` describes it, unless `wait`.
    """
    while True:
        try:
            file = path.open("ab")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None
        if not lock(file, wait=wait):
            file.close()
            raise InputError(
                f"{path.parent} is being written by another {holder}; wait for it, or choose another directory"
            )
        if _is_at(file, path):
            break
        file.close()  # its holder has just removed the file, so this lock is on a deleted file
    try:
        yield
    finally:
        remove_locked(file, path)


def remove_locked(file: IO[Any], path: Path) -> None:
    """Close a locked file and remove it: before the lock is released, so that it cannot be another process's file.

    Windows removes no open file, so there it is closed first.
    """
    if fcntl is not None:
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):  # on a full disk, flushing the last bytes fails
        file.close()
    if fcntl is None:
        with suppress(OSError):
            path.unlink()


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
