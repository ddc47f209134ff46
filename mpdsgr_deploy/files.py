"""Files that survive: atomic writes, hashes, and output directories that are never somebody else's."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mpdsgr_deploy.errors import InputError


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Turn what the system says of writing `path` into an InputError with advice; `kept` says what is not lost."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = f"free some space and run again; {kept}" if full else "choose another place"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, so that `path` holds either its old content or all of the new, whenever the process dies.

    Raises InputError if the disk is full or the path cannot be written; the old file is then untouched, as it is when
    the block raises.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a killed run leaves at most one behind
    with writing(path, "what was there before is untouched"):
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
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the renaming itself survives a power cut
        finally:
            os.close(directory)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def claim_directory(path: Path, marker: str, what: str, *, partial: str = "") -> None:
    """Make `path` a directory for our output. Existing content is accepted only beside `marker`, our own file.

    partial: a name that unfinished output has there, from which a later run goes on.

    Raises InputError for a file, for a directory that holds anything else, and where it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        leftover = f".{marker}.tmp"  # of a run killed while it wrote its first file
        foreign = not (path / marker).exists() and any(p.name not in (leftover, partial) for p in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot use {path} as a directory: {error.strerror}; choose another place") from None
    if foreign:
        raise InputError(f"{path} exists and is not a {what} of ours (it has no {marker}); choose an empty directory")


def recover_directory(out: Path) -> None:
    """Bring back what was in `out`, where an earlier `replace_directory` died between its two renames."""
    if _replaced(out).exists() and not out.exists():
        _replaced(out).rename(out)


@contextmanager
def scratch_directory(out: Path, what: str) -> Iterator[Path]:
    """An empty directory beside `out`, which was claimed, to make `what` in; `replace_directory` puts it in place.

    It is gone after the block, and `out` too if it is still empty. Raises InputError where the system refuses to write.
    """
    scratch = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
    except OSError as error:
        raise InputError(f"cannot write {what} {out}: {error.strerror or error}; an older one is untouched") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # only an empty directory, the one claimed for nothing, can be removed so
            out.rmdir()


def replace_directory(scratch: Path, out: Path) -> None:
    """Put `scratch` where `out` is. A process that dies in between leaves what `recover_directory` brings back."""
    old = _replaced(out)
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")
