"""Output directories: claimed, so that no other files are overwritten, and replaced as a whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpdsgr_deploy.atomic_files import writing
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive


def claim_directory(path: Path, marker: str, what: str, *, partial: str = "") -> None:
    """Create an output directory, or accept an existing one that is empty or holds the file `marker`.

    what: what error messages call the output. partial: the name of unfinished output, which is accepted as well because
    a later run continues it. Raises InputError for a file, for a directory with other content, and for a directory that
    cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        ours = {f".{marker}.tmp", LOCK, partial}  # left by a run that was killed before it wrote the marker
        foreign = not (path / marker).exists() and any(p.name not in ours for p in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot use {path} as a directory: {error.strerror}; choose another place") from None
    if foreign:
        raise not_ours(path, marker, what)


def not_ours(place: object, marker: str, what: str) -> InputError:
    """Return the error to raise for an output directory `place` that holds other files."""
    return InputError(f"{place} exists and is not a {what} of mpdsgr (it has no {marker}); choose an empty directory")


def recover_directory(out: Path) -> None:
    """Restore `out` if an earlier `replace_directory` was killed between its two renames."""
    if _replaced(out).exists() and not out.exists():
        _replaced(out).rename(out)


@contextmanager
def scratch_directory(out: Path, what: str) -> Iterator[Path]:
    """Yield an empty directory beside the claimed `out`, to build `what` in; `replace_directory` moves it to `out`.

    After the block it is removed, and `out` too if it is empty. Raises InputError as `writing` does for an OSError of
    the block, and while another process builds for the same `out`.
    """
    scratch = out.with_name(f".{out.name}.tmp")
    with exclusive(out.with_name(f".{out.name}{LOCK}"), f"process that makes {what} {out}"):
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with writing(out, f"an earlier {what} is unchanged"):
                scratch.mkdir()
                yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):  # this removes only an empty directory
                out.rmdir()


def replace_directory(scratch: Path, out: Path) -> None:
    """Replace the directory `out` by `scratch`. If the process is killed while it does, use `recover_directory`."""
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
