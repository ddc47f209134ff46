"""Files in object stores and other file systems of fsspec: s3://BUCKET/KEY, gs://BUCKET/KEY, hf://...

The store's library finds credentials (environment, configuration, the machine's role). Listings are never cached, since
other machines write into the same folders.
"""

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from mpdsgr_deploy.errors import InputError, MpdsgrError, StoreError, explained, one_line
from mpdsgr_deploy.lookup import need

PROTOCOL = re.compile(r"([a-z][a-z0-9+]*)://")
HERE = ("file", "local")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # protocol -> extra of this package
READ_AHEAD = 2**20  # smallest number of bytes in a request
# Entries of listings that change with a file's content; the first one that a file system has is used
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "Last-Modified", "last_modified", "created")


@dataclass
class Stored:
    """A file or folder in a store. store: the file system of fsspec; path: the path in it."""

    address: str
    store: Any
    path: str
    _info: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "Stored":
        return Stored(f"{self.address.rstrip('/')}/{name}", self.store, f"{self.path}/{name}")

    def info(self) -> Mapping[str, Any]:
        """Return the entry in the store's listing, read at the first call. Raises as `asking` does."""
        if self._info is None:
            with asking(self):
                self._info = self.store.info(self.path)
        return cast(Mapping[str, Any], self._info)


Place = Path | Stored


def place_of(text: str) -> Place:
    """Return the place that a path or an address names, without a request to a store.

    Raises InputError for an unknown protocol, and for one whose package is not installed.
    """
    protocol = PROTOCOL.match(text)
    if protocol is None:
        return Path(text)
    if protocol[1] in HERE:
        return Path(text[protocol.end() :])
    core = need("fsspec.core", "remote")
    try:
        return Stored(text, *core.url_to_fs(text, use_listings_cache=False))
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(protocol[1])
        advice = f"; install it with: pip install 'mpdsgr-deploy[{extra}]'" if extra else ""
        raise InputError(f"cannot use {text}: {one_line(error)}{advice}") from error


def suffix_of(place: Place | str) -> str:
    """Return the suffix of a path or an address in lower case, such as ".png"; empty if it has none."""
    return PurePosixPath(str(place)).suffix.lower()


def asking(address: object) -> AbstractContextManager[None]:
    """Raise errors of a store's library during the block as those that `failure` returns."""
    return explained(partial(failure, address))


def failure(address: object, error: BaseException) -> MpdsgrError:
    """Return the error to raise for an error of a store's library.

    It is an InputError if the address does not exist, else a StoreError, as for missing credentials.
    """
    reason = one_line(error)
    if isinstance(error, FileNotFoundError):
        detail = "" if reason in str(address) else f": {reason}"
        return InputError(f"{address} does not exist{detail}")
    if "Credential" in type(error).__name__:
        return StoreError(f"cannot use {address}: {reason}; every machine that reads or writes there needs them")
    if isinstance(error, PermissionError):
        return StoreError(f"cannot use {address}: access denied ({reason}); check the credentials and their rights")
    return StoreError(f"cannot use {address}: {type(error).__name__}: {reason}")


def opened(place: Place) -> IO[bytes]:
    """Open a file for reading, by byte ranges if it is in a store.

    Raises OSError for a local file that cannot be opened, and for a stored one as `asking` does.
    """
    if isinstance(place, Path):
        return place.open("rb")
    return BufferedReader(_Ranges(place), READ_AHEAD)


class _Ranges(RawIOBase):
    """A stored file that is read by byte ranges.

    It raises errors of this package, so that readers do not take a failed request for a damaged file.
    """

    def __init__(self, place: Stored) -> None:
        self._place, self._at = place, 0
        self._size = int(place.info()["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._at = {SEEK_SET: 0, SEEK_CUR: self._at, SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        with asking(self._place):
            content = self._place.store.cat_file(self._place.path, start=self._at, end=end)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def stamp_of(place: Place) -> str:
    """Return a text that changes whenever the file does, from its size and time, or its tag in a store.

    Raises as `asking` does for a stored file. For a local file that is missing, the text says so.
    """
    if isinstance(place, Stored):
        return stamp_from(place.address, place.info())
    try:
        status = os.stat(place)
    except OSError:
        return f"{place}\0missing\0"
    return f"{place}\0{status.st_size}\0{status.st_mtime_ns}\0"


def stamp_from(address: str, info: Mapping[str, Any]) -> str:
    """Return what `stamp_of` returns for a stored file, from its entry `info` in the store's listing."""
    version = next((info[key] for key in VERSIONS if info.get(key)), "")
    return f"{address}\0{info.get('size')}\0{version}\0"


def name_in(stamp: str) -> str:
    """Return the address or path in a stamp."""
    return stamp.partition("\0")[0]


def is_empty(stamp: str) -> bool:
    """Whether a stamp is of a file without any bytes."""
    return stamp.split("\0")[1] == "0"
