"""Files that survive: atomic writes, hashes, and output directories that are never somebody else's."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from mpdsgr_deploy.errors import InputError


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new, whenever the process dies.

    Raises InputError if the disk is full or the path cannot be written; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a killed run leaves at most one behind
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the renaming itself survives a power cut
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space and run again; what was there before is untouched" if full else "choose another place"
        raise InputError(f"cannot write {path}: {error.strerror}; {advice}") from error


def claim_directory(path: Path, marker: str, what: str) -> None:
    """Make `path` a directory for our output. Existing content is accepted only beside `marker`, our own file.

    Raises InputError for a file, for a directory that holds anything else, and where it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        leftover = f".{marker}.tmp"  # of a run killed while it wrote its first file
        foreign = not (path / marker).exists() and any(p.name != leftover for p in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot use {path} as a directory: {error.strerror}; choose another place") from None
    if foreign:
        raise InputError(f"{path} exists and is not a {what} of ours (it has no {marker}); choose an empty directory")
