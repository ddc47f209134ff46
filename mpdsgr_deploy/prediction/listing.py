"""Resolve an input: an image, a shard, or a folder of them, on this machine or in a store. Folders are only listed.

Shards are NumPy arrays and Parquet files. Those of a folder are used only if it has no images.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from mpdsgr_deploy.data.events import RECORDINGS
from mpdsgr_deploy.data.image_files import ARRAY_SUFFIXES, Shape, image_suffixes, passed_over, walk
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction.arrays import ArrayFile
from mpdsgr_deploy.prediction.parquet import ParquetImages
from mpdsgr_deploy.prediction.sources import ImageSource, takes_images
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.stores import Place, Stored, asking, name_in, place_of, stamp_from, suffix_of

PARQUET_SUFFIXES = {".parquet", ".pq"}
SHARDS = ARRAY_SUFFIXES | PARQUET_SUFFIXES


class Listed(NamedTuple):
    """The images of an input (local paths, or stamps in `store`, a file system of fsspec), or its shards."""

    images: Sequence[str]
    shards: Sequence[Place] = ()
    store: Any = None


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
