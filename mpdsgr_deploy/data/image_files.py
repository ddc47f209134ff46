"""Read images from files. Folders are walked as torchvision's ImageFolder does; ignored files are counted."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import track

Shape = tuple[int, int, int]  # channels, height, width
ARRAY_SUFFIXES = {".npy", ".npz"}
# Pillow registers these formats, but cannot decode them, or not without another library or program
UNREADABLE = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF"}


def read_image(path: Path, shape: Shape) -> NDArray[np.uint8]:
    """Decode an image file to uint8 of `shape` (C, H, W), in grey if C is 1, else in RGB.

    The image is turned upright as its EXIF data say, resized to fill H x W, and cropped at the centre. Transparent
    pixels become white, as viewers and browsers show them. Raises InputError for a file that is not an image, or has
    more than 8 bits per channel.
    """
    return decode_image(path, str(path), shape)


def decode_image(source: Path | bytes, name: str, shape: Shape) -> NDArray[np.uint8]:
    """Decode a file, or its content, as `read_image` does; `name` is the file's name for error messages."""
    channels, height, width = shape
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode[0] in "IF":
                raise InputError(
                    f"{name} has more than 8 bits per channel, which would be clipped; convert it to 8 bits first"
                )
            upright = opaque(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"cannot decode image {name}: it is in no format that Pillow reads") from None
    except Exception as error:  # pillow raises OSError, SyntaxError and more for a damaged file
        raise InputError(f"cannot decode image {name}: {error}") from None
    return np.asarray(fitted).reshape(height, width, channels).transpose(2, 0, 1)


def opaque(image: Image.Image) -> Image.Image:
    """Return the image itself if it has no transparency, else RGBA with its colours composed on white."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def read_labelled(
    files: Sequence[tuple[Path, int]],
    read: Callable[[Path, Shape], NDArray[np.uint8]],
    *,
    shape: Shape,
    labels: tuple[str, ...],
    name: str,
) -> Images:
    """Read a data set into one array, with `read(path, shape)` for each of its files.

    files: paths and classes in [0, len(labels)). name: that of the data set. Raises the errors of `read`.
    """
    pixels = np.empty((len(files), *shape), np.uint8)
    for i, (path, _) in enumerate(track(files, f"reading {name}")):
        pixels[i] = read(path, shape)
    return Images(pixels, np.array([k for _, k in files], np.int64), labels)


class Walk(NamedTuple):
    """Files in sorted order, and the numbers of others that were passed over, by reason (".txt", "hidden", ...)."""

    files: list[Path]
    passed_over: Counter[str]


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of all formats that Pillow reads."""
    suffixes = Image.registered_extensions()
    return frozenset(suffix for suffix, name in suffixes.items() if name in Image.OPEN and name not in UNREADABLE)


def walk(folder: Path, suffixes: Collection[str]) -> Walk:
    """List the files in a folder and its subfolders that have one of the suffixes, which are in lower case.

    Hidden names, which begin with a dot, are passed over, as are files with other suffixes and links that lead nowhere
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
    """Return the files of `walk`, or an empty list if the folder does not exist."""
    return walk(folder, suffixes).files if folder.is_dir() else []


def passed_over(counts: Counter[str]) -> str:
    """Put the counts of `Walk.passed_over` into words: "5 .txt, 2 hidden"; empty if nothing was passed over."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item)))


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's classes: its subfolders that are not hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _entries(folder: Path, above: tuple[tuple[int, int], ...], counts: Counter[str]) -> Iterator[Path]:
    """Yield all regular files below a folder that are not hidden, and count other entries in `counts`.

    above: the device and inode of the folders above, by which loops are detected.
    """
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from None
    ancestors = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            counts["hidden"] += 1
        elif path.is_dir():
            inside = path.stat()
            if (inside.st_dev, inside.st_ino) in ancestors:
                counts["link in a circle"] += 1
            else:
                yield from _entries(path, ancestors, counts)
        elif path.is_file():
            yield path
        else:
            counts["broken link" if entry.is_symlink() else "neither file nor folder"] += 1
