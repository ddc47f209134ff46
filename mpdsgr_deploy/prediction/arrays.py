"""Images in NumPy's array files, read on demand from disk, or from a store by byte ranges."""

from concurrent.futures import Executor
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np

from mpdsgr_deploy.data.image_files import Shape
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction.sources import Pixels, ShardFile, reading
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.stores import Place, opened, suffix_of

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayFile(ShardFile):
    """The images [N, C, H, W] of a .npy file, or of a .npz file's array `images`, or else its first array.

    They are uint8, or float32 in [0, 1]; shape: (C, H, W). Raises InputError for another dtype or shape, for pixels out
    of range, for an array in Fortran order, and for a damaged file.
    """

    def __init__(self, path: Place, shape: Shape) -> None:
        super().__init__(path, shape)
        with reading(f"array {path}"), self._open() as file:
            version = np.lib.format.read_magic(file)
            if version not in HEADERS:
                raise ValueError(f"unknown version {version} of the .npy format")
            array_shape, fortran_order, self._dtype = HEADERS[version](file)
            self._offset = file.tell()
        expected_shape = ", ".join(map(str, shape))
        if len(array_shape) != 4 or not array_shape[0] or array_shape[1:] != shape:
            raise InputError(
                f"{path}: images must have shape [N >= 1, {expected_shape}], and these have {list(array_shape)}"
            )
        if self._dtype not in (np.uint8, np.float32):
            raise InputError(f"{path}: images must be uint8, or float32 in [0, 1], and these are {self._dtype}")
        if fortran_order:
            raise InputError(
                f"{path} is in Fortran order, so its images are not contiguous; save np.ascontiguousarray of the array"
            )
        self.count = array_shape[0]

    def read(self, start: int, stop: int, pool: Executor) -> Pixels:
        images: Pixels = np.empty((stop - start, *self.shape), self._dtype)
        with reading(f"array {self._path}"):
            if self._file is None:
                self._file = self._open()
            # seeking backwards decompresses a member from its start, so the file stays open between reads
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

    def _open(self) -> IO[bytes]:
        if suffix_of(self._path) == ".npy":
            return opened(self._path)
        with ZipFile(self._path if isinstance(self._path, Path) else opened(self._path)) as archive:
            names = archive.namelist()
            if not names:
                raise ValueError("it holds no arrays")
            return archive.open("images.npy" if "images.npy" in names else names[0])
