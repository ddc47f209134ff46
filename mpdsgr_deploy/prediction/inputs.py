"""Find the inputs of a run, on this machine or in a store, and read them in batches of limited size.

An input is an image, a shard, or a folder of them. Folders are listed first, and files are read on demand. Shards are
NumPy arrays and Parquet files. Those of a folder are used only if it has no images.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mpdsgr_deploy.data.events import RECORDINGS
from mpdsgr_deploy.data.image_files import ARRAY_SUFFIXES, Shape, image_suffixes, passed_over, walk
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.prediction.arrays import ArrayFile
from mpdsgr_deploy.prediction.parquet import ParquetImages
from mpdsgr_deploy.prediction.sources import ImageFiles, ImageSource, Pixels, StoredImages, takes_images
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.stores import Place, Stored, asking, name_in, opened, place_of, stamp_from, suffix_of

T = TypeVar("T")
PARQUET_SUFFIXES = {".parquet", ".pq"}
SHARDS = ARRAY_SUFFIXES | PARQUET_SUFFIXES
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
        last = runs[-1][-1] if runs else None
        if last is not None and last.source is batch.source and last.stop == batch.start:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return [batch for run in runs for batch in _with_part(run)]


def _with_part(run: Sequence[InputBatch]) -> Iterator[InputBatch]:
    first = run[0].start
    source, start = run[0].source.part(first, run[-1].stop)
    for batch in run:
        yield InputBatch(source, start + batch.start - first, start + batch.stop - first)


class Listed(NamedTuple):
    """The images of an input (local paths, or stamps in `store`, a file system of fsspec), or its shards."""

    images: Sequence[str]
    shards: Sequence[Place] = ()
    store: Any = None


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


def listed(place: Place, shape: Shape) -> Listed:
    """List the images or shards that an input names, for a network with images of `shape` (C, H, W).

    Raises InputError for a missing input and for a folder without images or shards, StoreError for a store that cannot
    be reached.
    """
    if isinstance(place, Stored):
        info = place.info()
        if info["type"] == "directory":
            return _of_folder(place, shape)
        stamp = stamp_from(place.address, info)
        return Listed([], [place]) if _is_shard(place.address) else Listed([stamp], store=place.store)
    if place.is_dir():
        return _of_folder(place, shape)
    if not place.exists():
        raise InputError(f"{place} does not exist; correct the path")
    return Listed([], [place]) if _is_shard(str(place)) else Listed([str(place)])


def open_shard(place: Place, shape: Shape) -> ImageSource:
    """Open the images of a shard. Raises InputError as ParquetImages or ArrayFile does."""
    kind = ParquetImages if suffix_of(str(place)) in PARQUET_SUFFIXES else ArrayFile
    return kind(place, shape)


def _of_folder(folder: Place, shape: Shape) -> Listed:
    suffixes = image_suffixes() if takes_images(shape) else {RECORDINGS}
    if isinstance(folder, Stored):
        files, counts = _walk_store(folder, suffixes | SHARDS)
    else:
        walked = walk(folder, suffixes | SHARDS)
        files, counts = [str(file) for file in walked.files], walked.passed_over
    images = [file for file in files if not _is_shard(name_in(file))]
    shards = [file for file in files if _is_shard(name_in(file))]
    if images:
        counts.update(suffix_of(name_in(shard)) for shard in shards)
    others = passed_over(counts)
    if not files:
        other_files = f", but other files: {others}" if others else ""
        raise InputError(
            f"folder {folder} has no images{other_files}; images end in {', '.join(sorted(suffixes | SHARDS))}"
        )
    if others:
        kind = "images" if images else "shards"
        log.info("%s: %d %s; ignored %s", folder, len(images or shards), kind, others)
    if images:
        return Listed(images, store=folder.store if isinstance(folder, Stored) else None)
    return Listed([], [place_of(name_in(shard)) for shard in shards])


def _walk_store(folder: Stored, suffixes: Collection[str]) -> tuple[list[str], Counter[str]]:
    """Walk a folder in a store as `walk` does a local one.

    Returns the stamps of its files, sorted like local paths, and the counts of those that were passed over.
    """
    stamps, counts = [], Counter[str]()
    with asking(folder):
        for _, folders, files in folder.store.walk(folder.path, detail=True, on_error="raise"):
            for name in [name for name in folders if name.startswith(".")]:
                del folders[name]
                counts["hidden"] += 1
            for name, info in files.items():
                if name.startswith("."):
                    counts["hidden"] += 1
                elif suffix_of(name) in suffixes:
                    stamps.append(stamp_from(folder.store.unstrip_protocol(info["name"]), info))
                elif name:  # an entry without a name is the folder itself
                    counts[suffix_of(name) or "without a suffix"] += 1
    return sorted(stamps, key=lambda stamp: name_in(stamp).split("/")), counts


def _is_shard(name: str) -> bool:
    return suffix_of(name) in SHARDS


def read_list(file: Place) -> list[Place]:
    """Read paths and addresses from a text file, one per line; "-" is standard input. Blank lines are ignored.

    Paths are relative to the working directory. Raises InputError for a file that cannot be read or names nothing,
    StoreError for a store that cannot be reached.
    """
    try:
        if str(file) == "-":
            content = sys.stdin.buffer.read()
        else:
            with opened(file) as source:
                content = source.read()
    except OSError as error:
        raise InputError(f"cannot read --list {file}: {error.strerror}") from None
    # file names need not be UTF-8
    paths = [place_of(os.fsdecode(line)) for line in content.splitlines() if line.strip()]
    if not paths:
        raise InputError(f"--list {file} names no inputs")
    return paths
