"""Walk folders of images as torchvision's ImageFolder does: follow links, and count the files passed over."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mpdsgr_deploy.errors import InputError

# Pillow knows these formats' names, but cannot decode them without another library or program, or at all
UNREADABLE = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF"}


class Walk(NamedTuple):
    """Files in sorted order, and how many others were passed over for which reason (".txt", "hidden", ...)."""

    files: list[Path]
    passed_over: Counter[str]


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of all formats that Pillow reads."""
    suffixes = Image.registered_extensions()
    return frozenset(suffix for suffix, name in suffixes.items() if name in Image.OPEN and name not in UNREADABLE)


def walk(folder: Path, suffixes: Collection[str]) -> Walk:
    """List the files with one of the suffixes in a folder and its subfolders, sorted.

    Names that begin with a dot are hidden and passed over, as are files with other suffixes and links that lead nowhere
    or back to a folder above. Raises InputError for a folder that cannot be read.
    """
    walked = Walk([], Counter())
    for path in _entries(folder, (), walked.passed_over):
        suffix = path.suffix.lower()
        if suffix in suffixes:
            walked.files.append(path)
        else:
            walked.passed_over[suffix or "without a suffix"] += 1
    walked.files.sort()
    return walked


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """List the files of `walk`; none if the folder does not exist."""
    return walk(folder, suffixes).files if folder.is_dir() else []


def passed_over(counts: Counter[str]) -> str:
    """Put the counts of `Walk.passed_over` into words: "5 .txt, 2 hidden"; empty if nothing was passed over."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item)))


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's subfolders, sorted, without hidden ones: its classes."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _entries(folder: Path, above: tuple[tuple[int, int], ...], counts: Counter[str]) -> Iterator[Path]:
    """Yield all regular files below a folder; `above` are its parents, by device and inode, to detect loops."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from None
    here = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            counts["hidden"] += 1
        elif path.is_dir():
            inside = path.stat()
            if (inside.st_dev, inside.st_ino) in here:
                counts["link in a circle"] += 1
            else:
                yield from _entries(path, here, counts)
        elif path.is_file():
            yield path
        else:
            counts["broken link" if entry.is_symlink() else "neither file nor folder"] += 1
