"""Images in a fixed order, read in consecutive ranges from files on this machine or in a store."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from copy import copy
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.data.events import decode_frames, read_frames
from mpdsgr_deploy.data.image_files import Shape, decode_image, read_image
from mpdsgr_deploy.errors import InputError, explained, one_line
from mpdsgr_deploy.stores import Place, failure, is_empty, name_in, stamp_of

Pixels = NDArray[Any]  # [B, C, H, W]: uint8, or float32 in [0, 1]


def takes_images(shape: Shape) -> bool:
    """Whether a network's input is an image, grey or RGB, and not the frames of an event camera."""
    return shape[0] in (1, 3)


class ImageFiles:
    """Image files, or event recordings if the network's input does not have 1 or 3 channels.

    `read` is called for consecutive ranges, may use the pool's threads, and raises InputError for an image that cannot
    be used.
    """

    def __init__(self, files: Sequence[str], shape: Shape, store: Any = None) -> None:
        self.shape, self.store = shape, store
        self._files = list(files)  # as strings, because a million Path objects take several times the memory

    def extend(self, files: Sequence[str]) -> None:
        self._files += files

    def __len__(self) -> int:
        return len(self._files)

    def part(self, start: int, stop: int) -> tuple[Self, int]:
        """Return a source of these images for another thread or process, and the index of their first image in it."""
        return type(self)(self._files[start:stop], self.shape, self.store), 0

    def names(self, start: int, stop: int) -> list[str]:
        return self._files[start:stop]

    def read(self, start: int, stop: int, pool: Executor) -> NDArray[np.uint8]:
        read = partial(read_image if takes_images(self.shape) else read_frames, shape=self.shape)
        return np.stack(list(pool.map(read, map(Path, self._files[start:stop]))))  # pillow releases the GIL

    def stamp(self, start: int, stop: int) -> str:
        """Return a text that changes whenever the files of these images do."""
        return "".join(stamp_of(Path(file)) for file in self._files[start:stop])

    def close(self) -> None: ...


class StoredImages(ImageFiles):
    """Image files in `store`, a file system of fsspec, given by their stamps. Those of a range are fetched together.

    A stamp begins with the address, so that a file needs only one string. `read` raises InputError for a file that is
    missing or damaged, StoreError for a store that cannot be reached.
    """

    def names(self, start: int, stop: int) -> list[str]:
        return [name_in(stamp) for stamp in self._files[start:stop]]

    def read(self, start: int, stop: int, pool: Executor) -> NDArray[np.uint8]:
        names = self.names(start, stop)
        non_empty = [name_in(stamp) for stamp in self._files[start:stop] if not is_empty(stamp)]
        # not `cat`, which takes the brackets of photo[1].png for a pattern. A range from byte 0 on, because s3fs asks
        # for the size before it fetches a whole file; S3 refuses such a range of an empty file.
        contents = dict(zip(non_empty, self.store.cat_ranges(non_empty, 0, None, on_error="return"), strict=True))
        for name, content in contents.items():
            if isinstance(content, BaseException):
                raise failure(name, content)
        return decoded(names, (contents.get(name, b"") for name in names), self.shape, pool)

    def stamp(self, start: int, stop: int) -> str:
        return "".join(self._files[start:stop])


class ShardFile(ABC):
    """One file with `count` images, which stays open between reads; it is read like `ImageFiles`.

    Image i is named FILE[i].
    """

    count: int
    _file: IO[bytes] | None

    def __init__(self, path: Place, shape: Shape) -> None:
        self._path, self.shape, self._stamp = path, shape, stamp_of(path)
        self._forget()

    def __len__(self) -> int:
        return self.count

    def part(self, start: int, stop: int) -> tuple[Self, int]:
        own_copy = copy(self)
        own_copy._forget()
        return own_copy, start

    def names(self, start: int, stop: int) -> list[str]:
        return [f"{self._path}[{i}]" for i in range(start, stop)]

    def stamp(self, start: int, stop: int) -> str:
        return f"{self._stamp}{start}:{stop}"

    @abstractmethod
    def read(self, start: int, stop: int, pool: Executor) -> Pixels: ...

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._forget()

    def _forget(self) -> None:
        self._file = None


# Images of `shape` (C, H, W) in a fixed order, in ranges from `start` up to, but not including, `stop`
ImageSource = ImageFiles | ShardFile


def reading(what: str) -> AbstractContextManager[None]:
    """Turn errors in a with block into InputError "cannot read WHAT: ...", except for those of this package."""
    return explained(lambda error: InputError(f"cannot read {what}: {one_line(error)}"))


def decoded(names: Sequence[str], contents: Iterable[bytes], shape: Shape, pool: Executor) -> NDArray[np.uint8]:
    """Decode files, given by name and content, to pixels uint8 [B, C, H, W]. Raises InputError for a damaged file."""
    decode = partial(decode_image if takes_images(shape) else decode_frames, shape=shape)
    return np.stack(list(pool.map(decode, contents, names)))
