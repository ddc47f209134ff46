"""Locks between processes, held on files, on POSIX systems and Windows."""

import errno
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

LOCK = ".lock"  # name of the lock file of a directory


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Take the exclusive lock of an open file, which closing it releases; return False if another process has the lock.

    wait: block until the lock is free. On a file system without locks the result is always True.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            _lock_on_windows(file, wait=wait)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _lock_on_windows(file: IO[Any], *, wait: bool) -> None:
    """Lock one byte far behind the content, because other processes cannot read a locked part."""
    mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK  # type: ignore[attr-defined, unused-ignore]
    position = file.tell()
    file.seek(2**31 - 2)
    try:
        while True:
            try:
                msvcrt.locking(file.fileno(), mode, 1)  # type: ignore[attr-defined, unused-ignore]
                return
            except OSError as error:
                if error.errno != errno.EDEADLK:  # raised if the lock was not free for ten seconds
                    raise
    finally:
        file.seek(position)


@contextmanager
def exclusive(path: Path, holder: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block, and remove it afterwards.

    wait: block until another process releases it; otherwise this raises InputError, in which `holder` describes that
    process. Raises InputError also if the file cannot be written.
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
        file.close()  # the former holder has removed the file in the meantime, so try again with a new one
    try:
        yield
    finally:
        remove_locked(file, path)


def remove_locked(file: IO[Any], path: Path) -> None:
    """Close a locked file and remove it. It is removed before the lock is released, while no other process can own it.

    Windows does not remove open files, so there it is closed first.
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
