"""Read images from files."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import track

Shape = tuple[int, int, int]  # channels, height, width
ARRAY_SUFFIXES = {".npy", ".npz"}


def read_image(path: Path, shape: Shape) -> NDArray[np.uint8]:
    """Decode to uint8 [C, H, W] = shape: resized to fill it, centre cropped; grey if C is 1, else RGB.

    Transparent pixels are laid on white, as viewers and browsers show them.

    Raises InputError for a file that is not an image.
    """
    return _decoded(path, str(path), shape)


def decode_image(content: bytes, name: str, shape: Shape) -> NDArray[np.uint8]:
    """Decode a file's content as `read_image` does; `name` is the file's name for error messages."""
    return _decoded(BytesIO(content), name, shape)


def _decoded(source: Path | BytesIO, name: str, shape: Shape) -> NDArray[np.uint8]:
    channels, height, width = shape
    try:
        with Image.open(source) as image:
            if image.mode[0] in "IF":
                raise InputError(f"{name} has more than 8 bits a channel, which would be clipped; convert it first")
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
    """Return the image itself if it has no transparency, else its colours laid on white."""
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
    """Read data set `name` with `read(path, shape)` for each of its files, into an array that is allocated once."""
    pixels = np.empty((len(files), *shape), np.uint8)
    for i, (path, _) in enumerate(track(files, f"reading {name}")):
        pixels[i] = read(path, shape)
    return Images(pixels, np.array([k for _, k in files], np.int64), labels)
