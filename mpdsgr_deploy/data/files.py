"""Images and arrays from files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mpdsgr_deploy.data.events import RECORDINGS, read_frames
from mpdsgr_deploy.data.images import Images, to_unit
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import track

Shape = tuple[int, int, int]  # channels, height, width
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
ARRAY_SUFFIXES = {".npy", ".npz"}


def files_below(folder: Path, suffixes: set[str]) -> list[Path]:
    """Every file with one of the suffixes in a folder and its subfolders, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)


def read_image(path: Path, shape: Shape) -> NDArray[np.uint8]:
    """Decode to uint8 [C, H, W] = shape: resized to fill it, centre cropped; grey if C is 1, else RGB.

    Raises InputError for a file that is no image.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise InputError(f"{path} has more than 8 bits a channel, which would be clipped; convert it first")
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot decode image {path}: {error}") from None
    return np.asarray(fitted).reshape(height, width, channels).transpose(2, 0, 1)


def read_labelled(
    files: Sequence[tuple[Path, int]],
    read: Callable[[Path, Shape], NDArray[np.uint8]],
    *,
    shape: Shape,
    labels: tuple[str, ...],
    name: str,
) -> Images:
    """Data set `name` from its files and their classes: `read(path, shape)` of each, in one array allocated once."""
    pixels = np.empty((len(files), *shape), np.uint8)
    for i, (path, _) in enumerate(track(files, f"reading {name}")):
        pixels[i] = read(path, shape)
    return Images(pixels, np.array([k for _, k in files], np.int64), labels)


def read_array(path: Path) -> NDArray[np.float32]:
    """Images [N, C, H, W] of a .npy file or a .npz's array `images` (or its only one): uint8, or float32 in [0, 1].

    uint8 is scaled to [0, 1]. Raises InputError for another dtype or a damaged file.
    """
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.lib.npyio.NpzFile):
                name = "images" if "images" in found.files else next(iter(found.files), "images")
                found = found[name]
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, MemoryError) as error:
        raise InputError(f"cannot read array {path}: {error}") from None
    if found.ndim != 4 or not len(found):
        raise InputError(f"{path}: images must have shape [N >= 1, C, H, W], these have {list(found.shape)}")
    if found.dtype == np.uint8:
        return to_unit(found)
    if found.dtype != np.float32:
        raise InputError(f"{path}: images must be uint8, or float32 in [0, 1]; these are {found.dtype}")
    return found


def read_inputs(inputs: Sequence[Path], shape: Shape) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """Names and images [N, *shape] of each input in turn: an image, a folder of images, or an array file.

    A network whose input has other than 1 or 3 channels takes event recordings in place of images.
    """
    images_wanted = shape[0] in (1, 3)
    read = read_image if images_wanted else read_frames
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.suffix.lower() in ARRAY_SUFFIXES:
            images = read_array(path)
            yield [f"{path}[{i}]" for i in range(len(images))], images
            continue
        suffixes = IMAGE_SUFFIXES if images_wanted else {RECORDINGS}
        files = files_below(path, suffixes) if path.is_dir() else [path]
        if not files:
            raise InputError(f"no images in folder {path}; looked for {', '.join(sorted(suffixes))}")
        pixels = np.stack([read(file, shape) for file in files])
        yield [str(file) for file in files], to_unit(pixels)
