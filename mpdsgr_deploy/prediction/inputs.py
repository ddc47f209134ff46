"""Read any number of inputs in batches of limited size: folders are listed first, and files are read on demand."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mpdsgr_deploy.data.image_files import Shape
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.prediction.listing import Listed, listed, open_shard
from mpdsgr_deploy.prediction.sources import ImageFiles, ImageSource, Pixels, StoredImages
from mpdsgr_deploy.stores import Place

T = TypeVar("T")
AT_ONCE = 32  # inputs about which a store is asked at the same time
WINDOW = 1024  # inputs whose answers wait in memory


class Read(NamedTuple):
    """The pixels [B, C, H, W] of a batch, and the faults of unusable images, whose pixels are 0, by position."""

    pixels: Pixels
    faults: dict[int, str]


@dataclass(frozen=True)
class InputBatch:
    """The images of a source from `start` up to, but not including, `stop`."""

    source: ImageSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def names(self) -> list[str]:
        return self.source.names(self.start, self.stop)

    def alone(self) -> "InputBatch":
        """Return the same batch with its own copy of the part of the source that it needs."""
        (batch,) = travelling([self])
        return batch

    def follows(self, other: "InputBatch") -> bool:
        """Whether this batch begins where the other one ends, in the same source."""
        return self.source is other.source and self.start == other.stop

    def read(self, pool: Executor) -> Pixels:
        """Read the images [B, C, H, W]. Raises InputError, which names the file, if one is unusable."""
        return self.source.read(self.start, self.stop, pool)

    def read_usable(self, pool: Executor) -> Read:
        """Read the images; those that cannot be used have a fault instead."""
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
        """Return a text that changes whenever the files of the images do."""
        return self.source.stamp(self.start, self.stop)


def travelling(batches: Sequence[InputBatch]) -> list[InputBatch]:
    """Return the same batches for another thread or machine, with copies of the parts of their sources that they need.

    Consecutive batches share such a part, so its file is opened once and compressed content is read once.
    """
    runs: list[list[InputBatch]] = []
    for batch in batches:
        if runs and batch.follows(runs[-1][-1]):
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return [batch for run in runs for batch in _with_part(run)]


def _with_part(run: Sequence[InputBatch]) -> Iterator[InputBatch]:
    first = run[0].start
    source, start = run[0].source.part(first, run[-1].stop)
    for batch in run:
        yield InputBatch(source, start + batch.start - first, start + batch.stop - first)


class Inputs(AbstractContextManager["Inputs"]):
    """Images, folders of images and shards, in the given order. The end of a with block closes their files.

    shape: (C, H, W) of the network's images. unusable: with `skip`, the reason for each input that cannot be opened.
    Without it, they raise InputError: a missing input, an empty folder, and a shard of other images. Raises StoreError
    for a store that does not answer.
    """

    def __init__(self, places: Sequence[Place], shape: Shape, *, skip: bool = False) -> None:
        self._sources: list[ImageSource] = []
        self._skip, self._shape = skip, shape
        self.unusable: dict[str, str] = {}
        for names in self._each(partial(listed, shape=shape), places):
            self._add(names)
            for shard in self._each(partial(open_shard, shape=shape), names.shards):
                self._sources.append(shard)

    def _each(self, answer: Callable[[Place], T], places: Sequence[Place]) -> Iterator[T]:
        """Yield the answers for the inputs in order, without skipped ones; many are asked of a store at a time."""

        def tried(place: Place) -> T | InputError:
            try:
                return answer(place)
            except InputError as error:
                return error

        for start in range(0, len(places), WINDOW):
            window = places[start : start + WINDOW]
            are_local = all(isinstance(place, Path) for place in window)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for place, result in zip(window, (map if are_local else pool.map)(tried, window), strict=True):
                    if not isinstance(result, InputError):
                        yield result
                    elif self._skip:
                        self.unusable[str(place)] = one_line(result)
                    else:
                        raise result

    def _add(self, names: Listed) -> None:
        """Add image files to the last source, if it is in the same store, so that single files fill batches."""
        last = self._sources[-1] if self._sources else None
        if not names.images:
            return
        if isinstance(last, ImageFiles) and last.store == names.store:
            last.extend(names.images)
        else:
            kind = ImageFiles if names.store is None else StoredImages
            self._sources.append(kind(names.images, self._shape, names.store))

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def batches(self, size: int) -> list[InputBatch]:
        """Return all images in batches of `size`; the last of a shard or of a series of image files may be smaller."""
        return [
            InputBatch(source, start, min(start + size, len(source)))
            for source in self._sources
            for start in range(0, len(source), size)
        ]

    def __exit__(self, *exception: object) -> None:
        for source in self._sources:
            source.close()
