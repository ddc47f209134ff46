"""Predict any number of inputs: reading, inference and writing overlap, and few batches are in memory at a time."""

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.atomic_files import atomic_file, followed, is_stream, writing
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data.likeness import Likeness
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.prediction.faults import Faults, place_of_faults
from mpdsgr_deploy.prediction.inputs import InputBatch, Inputs, Read
from mpdsgr_deploy.prediction.partial import Chunk, Partial
from mpdsgr_deploy.prediction.workers import Submit, Worker, started
from mpdsgr_deploy.prediction.writers import SEVERAL_PASSES, find_writer
from mpdsgr_deploy.progress import log, predicting
from mpdsgr_deploy.stores import Place

Item = TypeVar("Item")
Result = TypeVar("Result")
READ_AHEAD = 2  # batches that are read in advance
DECODERS = min(8, os.cpu_count() or 1)  # threads that decode images


class Shard(NamedTuple):
    """Share `number`, counted from 1, of `total` equal shares."""

    number: int
    total: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this share of the items. Shares are contiguous, so all shares in order are all items."""
        start, stop = (len(items) * part // self.total for part in (self.number - 1, self.number))
        return items[start:stop]


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """Parse a text such as "2/8", the second of eight shares. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text!r}: write it as NUMBER/TOTAL, from 1/8 to 8/8 for example")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Job:
    """A prediction job: the network, the inputs (local, or in a store), and the options.

    batch: the number of images per inference; processes: the number that run inference; top: the number of labels per
    image. skip: leave out unusable inputs, and list them with the reasons in `place_of_faults`; without it they end the
    run. shard: the share of the batches to compute; all shares in order are the rows of the whole job, bit for bit.
    """

    bundle: Bundle
    paths: Sequence[Place]
    backend: str
    precision: str
    batch: int
    processes: int = 1
    top: int = 1
    skip: bool = False
    shard: Shard = WHOLE

    def to_stream(self, file: BinaryIO, suffix: str) -> int:
        """Write results to a stream as they are computed, in the format of a suffix; return the number of images.

        The format must be one that is written in a single pass. Raises errors as `to_file` does.
        """
        write = find_writer(suffix, self.bundle.manifest.labels, self.top)
        with self.open_inputs() as inputs:
            batches = self.shard.of(inputs.batches(self.batch))
            faults = Faults(inputs.unusable if self.shard.number == 1 else {})
            write(file, lambda: faults.without(self._answers(batches)))
            for name, reason in faults.reasons.items():
                log.warning("skipped %s: %s", name, reason)
            return sum(map(len, batches)) - faults.rows

    def to_file(self, out: Path) -> int:
        """Write the results to `out` in the format of its suffix, and return the number of images.

        `out` is replaced once everything is finished. Until then the finished logits are in `place_of_partial`, and the
        same job continues after them, or from the first image that was changed since. Raises InputError for inputs,
        options or an output that cannot be used, EvaluationError for a network that answers the golden batch wrongly
        or, without `skip`, gives logits that are not finite.
        """
        if out.is_dir():
            raise InputError(f"--out {out} is a directory; give the name of a file")
        self._refuse_overwriting(out)
        if is_stream(out):
            suffix = out.suffix or ".csv"
            if suffix in SEVERAL_PASSES:
                raise InputError(
                    f"{suffix} cannot be written to {out}, because it is written in several passes; give a regular file"
                )
            with atomic_file(out) as file:
                return self.to_stream(file, suffix)
        out = followed(out)
        labels = self.bundle.manifest.labels
        write = find_writer(out.suffix, labels, self.top)
        place = place_of_partial(out)
        with self.open_inputs() as inputs, Partial(place, self.settings(), len(labels)) as partial:
            batches = self.shard.of(inputs.batches(self.batch))
            done = partial.resume(batches)
            if done:
                log.info("continuing after the %d images in %s", sum(map(len, batches[:done])), place)
            elif not partial.was_empty:
                log.info(
                    "%s is from another bundle, other inputs or other settings; starting from the beginning", place
                )
            for batch, chunk in self._answers(batches, done):
                partial.append(batch, chunk.logits)
            faults = Faults(inputs.unusable if self.shard.number == 1 else {})
            with atomic_file(out) as file:
                write(file, lambda: faults.without(zip(batches, partial.chunks(batches), strict=True)))
            faults.save(place_of_faults(out))
            partial.finish()
            return sum(map(len, batches)) - faults.rows

    def logits(self) -> NDArray[np.float32]:
        """Return the logits float32 [N, K] of all inputs, whatever `shard` is. Raises errors as `to_file` does."""
        with self.open_inputs() as inputs:
            return np.concatenate([logits for _, (_, logits) in self._answers(inputs.batches(self.batch))])

    def _refuse_overwriting(self, out: Path) -> None:
        """Raise InputError if `out`, or a file beside it, would replace an input or a file of the bundle."""
        self.bundle.refuse_output(out)
        with writing(out, "nothing was written yet"):
            existing = [path for path in (out, place_of_partial(out), place_of_faults(out)) if path.exists()]
        for written in existing:
            for path in self.paths:
                if isinstance(path, Path) and path.is_file() and written.samefile(path):
                    raise InputError(f"--out {out} would overwrite the input {path}; choose another --out")

    def open_inputs(self) -> Inputs:
        """Return the inputs of the job. Raises InputError and StoreError as `Inputs` does."""
        return Inputs(self.paths, self.bundle.manifest.input_shape, skip=self.skip)

    def settings(self) -> str:
        """Return everything on which the logits depend except the inputs; the batch size affects their last bits."""
        return json.dumps([self.bundle.manifest.digest, self.backend, self.precision, self.batch])

    def _answers(self, batches: Sequence[InputBatch], done: int = 0) -> Iterator[tuple[InputBatch, Chunk]]:
        """Yield batches and their logits [B, K] in order, from batch `done` on; those of unusable images are NaN."""
        if done == len(batches):
            return
        worker = Worker(self.bundle, self.backend, self.precision, self.batch)
        with started(worker, self.processes) as submit:
            yield from self.answers_through(submit, batches, done)

    def answers_through(
        self, submit: Submit, batches: Sequence[InputBatch], done: int = 0
    ) -> Iterator[tuple[InputBatch, Chunk]]:
        """Yield batches and their logits [B, K] in order, from batch `done` on, computed by running workers.

        The logits of unusable images are NaN with `skip`; without it, they raise InputError, and logits that are not
        finite raise EvaluationError.
        """
        sizes = [len(batch) for batch in batches]
        fitted = self.batch
        trained = self.bundle.manifest.pixels
        likeness = Likeness(trained) if trained else None
        with (
            ThreadPoolExecutor(DECODERS) as decoders,
            ThreadPoolExecutor(1) as reader,
            predicting(total=sum(sizes), done=sum(sizes[:done])) as advance,
        ):
            read = ahead(batches[done:], lambda batch: reader.submit(self._read, batch, decoders), READ_AHEAD)
            for (batch, (images, bad)), answer in ahead(read, lambda pair: submit(pair[1].pixels), 2 * self.processes):
                if answer.batch < fitted:
                    fitted = answer.batch
                    log.info("out of memory; continuing with batches of %d", fitted)
                if likeness is not None:
                    likeness.add(np.delete(images, list(bad), axis=0) if bad else images)
                logits = answer.logits
                if bad:
                    logits[list(bad)] = np.nan
                elif not self.skip and not np.isfinite(logits).all():
                    name = batch.names()[int(np.flatnonzero(~np.isfinite(logits).all(1))[0])]
                    raise EvaluationError(
                        f"the network's logits for {name} are not finite; check the image, or export the network again"
                    )
                yield batch, Chunk(batch.names(), logits)
                advance(len(batch))
        if likeness is not None and (unlike := likeness.warning()):
            log.warning("%s", unlike)

    def _read(self, batch: InputBatch, pool: Executor) -> Read:
        return batch.read_usable(pool) if self.skip else Read(batch.read(pool), {})


def place_of_partial(out: Path) -> Path:
    """Return the file that stores the finished logits of output `out` until all are finished."""
    out = followed(out)
    return out.with_name(f"{out.name}.partial")


def ahead(
    items: Iterable[Item], submit: Callable[[Item], "Future[Result]"], limit: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of its future, in order, while at most `limit` further futures wait.

    If iterating or submitting fails, the results of earlier items come before the error.
    """
    source = iter(items)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    failure: Exception | None = None
    more = True
    while more or waiting:
        try:
            while more and len(waiting) <= limit:
                item = next(source)
                waiting.append((item, submit(item)))
        except StopIteration:
            more = False
        except Exception as error:
            more, failure = False, error
        if waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    if failure is not None:
        raise failure
