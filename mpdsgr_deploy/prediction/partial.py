"""Finished logits on disk, so that an interrupted run continues where it stopped."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.atomic_files import writing
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import lock, remove_locked
from mpdsgr_deploy.prediction.inputs import InputBatch

MAGIC = b"mpdsgr predictions 1\n"
BINARY = getattr(os, "O_BINARY", 0)  # exists only on Windows
KEPT = "finished results are kept"


class Chunk(NamedTuple):
    """The names [B] and the logits float32 [B, K] of a batch of images."""

    names: list[str]
    logits: NDArray[np.float32]


class Partial(AbstractContextManager["Partial"]):
    """A file of logits, with one record per batch. The end of a with block closes it, and removes it if it is empty.

        MAGIC, sha256 of the settings
        logits float32 [B, K], sha256 of (the digest before, the stamp of the batch, the logits)     for every batch

    The chain of digests shows how much of the file is whole and still belongs to the inputs and settings: a record that
    is incomplete or damaged, or whose image was changed since, is dropped with all that follow it.

    settings: everything that the logits depend on except the inputs; classes: K. Raises InputError if the file cannot
    be written, is no such file, or is being written by another process.
    """

    def __init__(self, path: Path, settings: str, classes: int) -> None:
        self.path, self._classes, self._finished = path, classes, False
        self._head = self._digest = MAGIC + hashlib.sha256(settings.encode()).digest()
        with writing(path, KEPT):
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666), "r+b")
        try:
            if not lock(self._file):
                raise InputError(f"{path} is being written by another mpdsgr predict; choose another --out")
            start = self._file.read(len(MAGIC))
            if not MAGIC.startswith(start):
                raise InputError(f"{path} was not written by mpdsgr predict; rename it or choose another --out")
            self.was_empty = not start
        except InputError:
            self._file.close()
            raise

    def resume(self, batches: Sequence[InputBatch]) -> int:
        """Return how many of the batches are finished, and remove everything that follows them in the file."""
        done, end = 0, 0
        self._file.seek(0)
        if self._file.read(len(self._head)) == self._head:
            end = len(self._head)
            for batch in batches:
                size = 4 * len(batch) * self._classes
                record = self._file.read(size + hashlib.sha256().digest_size)
                digest = self._next(batch, record[:size])
                if record[size:] != digest:
                    break
                self._digest = digest
                done, end = done + 1, end + len(record)
        with writing(self.path, KEPT):
            self._file.seek(end)
            self._file.truncate()
            if not end:
                self._file.write(self._head)
                self._file.flush()
        return done

    def append(self, batch: InputBatch, logits: NDArray[np.float32]) -> None:
        """Write the logits [B, K] of the next batch to disk, so that they survive the end of the process."""
        data = np.ascontiguousarray(logits, "<f4").tobytes()
        self._digest = self._next(batch, data)
        with writing(self.path, KEPT):
            self._file.write(data + self._digest)
            self._file.flush()

    def chunks(self, batches: Sequence[InputBatch]) -> Iterator[Chunk]:
        """Yield the finished batches, read from the file one by one. batches: all that are finished."""
        self._file.seek(len(self._head))
        for batch in batches:
            data = self._file.read(4 * len(batch) * self._classes)
            self._file.seek(hashlib.sha256().digest_size, os.SEEK_CUR)
            yield Chunk(batch.names(), np.frombuffer(data, "<f4").reshape(len(batch), self._classes))

    def finish(self) -> None:
        """Note that the output has been written, so that the end of the with block removes the file."""
        self._finished = True

    def _next(self, batch: InputBatch, data: bytes) -> bytes:
        return hashlib.sha256(self._digest + os.fsencode(batch.stamp()) + data).digest()

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            if self._finished or os.fstat(self._file.fileno()).st_size <= len(self._head):
                remove_locked(self._file, self.path)
        with suppress(OSError):  # on a full disk, flushing the last bytes fails again
            self._file.close()
