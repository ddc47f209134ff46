"""Inputs of any size in bounded batches: folders are listed, not read; arrays stay on disk until their turn."""

import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, Self
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.data.events import RECORDINGS, read_frames
from mpdsgr_deploy.data.files import ARRAY_SUFFIXES, Shape, read_image
from mpdsgr_deploy.data.folders import image_suffixes, passed_over, walk
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime.image_batches import check_images

Pixels = NDArray[Any]  # [B, C, H, W]: uint8, or float32 in [0, 1]
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ImageSource(Protocol):
    """Images in a fixed order. `read` is called for one stretch after another; it may use the pool's threads."""

    def __len__(self) -> int: ...
    @property
    def shape(self) -> Shape: ...
    def part(self, start: int, stop: int) -> tuple["ImageSource", int]:
        """A source that holds these images, for another process, and the index of the first in it."""
        ...

    def names(self, start: int, stop: int) -> list[str]: ...
    def read(self, start: int, stop: int, pool: Executor) -> Pixels: ...
    def stamp(self, start: int, stop: int) -> str:
        """A text that changes whenever the files behind these images do."""
        ...

    def close(self) -> None: ...


class ImageFiles:
    """Image files, or event recordings where the network's input has other than 1 or 3 channels."""

    def __init__(self, files: list[str], shape: Shape) -> None:
        self.shape = shape
        self._files = files  # as strings, a million paths take a fraction of the memory
        self._decode = partial(read_image if _takes_images(shape) else read_frames, shape=shape)

    def __len__(self) -> int:
        return len(self._files)

    def part(self, start: int, stop: int) -> tuple[ImageSource, int]:
        return ImageFiles(self._files[start:stop], self.shape), 0

    def names(self, start: int, stop: int) -> list[str]:
        return self._files[start:stop]

    def read(self, start: int, stop: int, pool: Executor) -> NDArray[np.uint8]:
        return np.stack(list(pool.map(self._decode, map(Path, self._files[start:stop]))))  # pillow releases the GIL

    def stamp(self, start: int, stop: int) -> str:
        return "".join(map(_stamp, self._files[start:stop]))

    def close(self) -> None: ...


class ArrayFile:
    """Images [N, C, H, W] of a .npy file or of a .npz's array `images` (or its first): uint8, or float32 in [0, 1].

    Raises InputError for another dtype or shape, pixels out of range, an array in Fortran order, a damaged file.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path, self.shape = path, shape
        self._file: IO[bytes] | None = None
        with self._reading(), self._open() as file:
            version = np.lib.format.read_magic(file)
            if version not in HEADERS:
                raise ValueError(f"unknown version {version} of the .npy format")
            array_shape, fortran_order, self._dtype = HEADERS[version](file)
            self._offset = file.tell()
        expected_shape = ", ".join(map(str, shape))
        if len(array_shape) != 4 or not array_shape[0] or array_shape[1:] != shape:
            raise InputError(
                f"{path}: images must have shape [N >= 1, {expected_shape}], these have {list(array_shape)}"
            )
        if self._dtype not in (np.uint8, np.float32):
            raise InputError(f"{path}: images must be uint8, or float32 in [0, 1]; these are {self._dtype}")
        if fortran_order:
            raise InputError(
                f"{path} is in Fortran order, so its images lie scattered; save np.ascontiguousarray of it"
            )
        self._count = array_shape[0]

    def __len__(self) -> int:
        return self._count

    def part(self, start: int, stop: int) -> tuple[ImageSource, int]:
        return self, start

    def names(self, start: int, stop: int) -> list[str]:
        return [f"{self._path}[{i}]" for i in range(start, stop)]

    def read(self, start: int, stop: int, pool: Executor) -> Pixels:
        images: Pixels = np.empty((stop - start, *self.shape), self._dtype)
        with self._reading():
            if self._file is None:
                self._file = self._open()
            # a compressed member is inflated from its start on a step back, so it stays open between the stretches
            self._file.seek(self._offset + start * images[0].nbytes)
            if self._file.readinto(images.data.cast("B")) < images.nbytes:  # type: ignore[attr-defined]
                raise EOFError("the file is cut off")
        if images.dtype == np.float32:
            try:
                check_images(images, self.shape)
            except InputError as error:
                raise InputError(f"{self._path}[{start}] to [{stop - 1}]: {error}") from None
        if stop == len(self):
            self.close()
        return images

    def stamp(self, start: int, stop: int) -> str:
        return f"{_stamp(str(self._path))}{start}:{stop}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        if self._path.suffix.lower() == ".npy":
            return self._path.open("rb")
        with ZipFile(self._path) as archive:
            names = archive.namelist()
            if not names:
                raise ValueError("it holds no arrays")
            return archive.open("images.npy" if "images.npy" in names else names[0])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        # NotImplementedError, RuntimeError: a compression or an encryption that zipfile does not know
        try:
            yield
        except (OSError, ValueError, EOFError, BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
            raise InputError(f"cannot read array {self._path}: {error}") from None


class Read(NamedTuple):
    """Pixels [B, C, H, W] of a batch, and by position why an image cannot be used; its pixels are 0."""

    pixels: Pixels
    faults: dict[int, str]


@dataclass(frozen=True)
class InputBatch:
    """The images from `start` up to, but without, `stop` of a source."""

    source: ImageSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def names(self) -> list[str]:
        return self.source.names(self.start, self.stop)

    def alone(self) -> "InputBatch":
        """The same batch with only the part of its source that it needs."""
        source, start = self.source.part(self.start, self.stop)
        return InputBatch(source, start, start + len(self))

    def read(self, pool: Executor) -> Pixels:
        """The images [B, C, H, W]. Raises InputError naming the file that cannot be used."""
        return self.source.read(self.start, self.stop, pool)

    def read_usable(self, pool: Executor) -> Read:
        """The images, with faults in place of those that cannot be used."""
        with suppress(InputError):
            return Read(self.read(pool), {})
        images, faults = {}, {}
        for i in range(len(self)):
            try:
                (images[i],) = self.source.read(self.start + i, self.start + i + 1, pool)
            except InputError as error:
                faults[i] = one_line(error)
        dtype = next(iter(images.values())).dtype if images else np.uint8
        pixels: Pixels = np.zeros((len(self), *self.source.shape), dtype)
        for i, image in images.items():
            pixels[i] = image
        return Read(pixels, faults)

    def stamp(self) -> str:
        """A text that changes whenever the files behind the images do."""
        return self.source.stamp(self.start, self.stop)


class Inputs:
    """Image files, folders of images and array files, in the order given. A context manager: closes what it opened.

    unusable: the paths that cannot be opened, with the reason, if `skip`. Else InputError is raised for a path that
    does not exist, an empty folder, or an array of another shape.
    """

    def __init__(self, paths: Sequence[Path], shape: Shape, *, skip: bool = False) -> None:
        self._sources: list[ImageSource] = []
        self.unusable: dict[str, str] = {}
        for arrays, group in groupby(paths, lambda path: path.suffix.lower() in ARRAY_SUFFIXES):
            files: list[str] = []  # in one source, so that batches are full when images are given one by one
            for path in group:
                try:
                    if not path.exists():
                        raise InputError(f"{path} does not exist")
                    if arrays:
                        self._sources.append(ArrayFile(path, shape))
                    else:
                        files += _files(path, shape)
                except InputError as error:
                    if not skip:
                        raise
                    self.unusable[str(path)] = one_line(error)
            if files:
                self._sources.append(ImageFiles(files, shape))

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def batches(self, size: int) -> list[InputBatch]:
        """All images in batches of `size`, fewer in the last batch of an array file or of a row of image files."""
        return [
            InputBatch(source, start, min(start + size, len(source)))
            for source in self._sources
            for start in range(0, len(source), size)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for source in self._sources:
            source.close()


def _takes_images(shape: Shape) -> bool:
    return shape[0] in (1, 3)


def _files(path: Path, shape: Shape) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    suffixes = image_suffixes() if _takes_images(shape) else {RECORDINGS}
    walked = walk(path, suffixes)
    others = passed_over(walked.passed_over)
    if not walked.files:
        seen = f", only others: {others}" if others else ""
        raise InputError(f"no images in folder {path}{seen}; looked for {', '.join(sorted(suffixes))}")
    if others:
        log.info("%s: %d images; passed over %s", path, len(walked.files), others)
    return [str(file) for file in walked.files]


def _stamp(file: str) -> str:
    try:
        status = os.stat(file)
    except OSError:
        return f"{file}\0missing\0"
    return f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0"
