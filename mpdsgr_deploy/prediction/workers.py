"""Workers that run inference on batches: a thread of this process, or several processes with a GPU each."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data.images import to_unit
from mpdsgr_deploy.errors import InputError, OutOfMemory, one_line
from mpdsgr_deploy.prediction.sources import Pixels
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime.open import open_predictor

GPUS = Path("/proc/driver/nvidia/gpus")  # has a folder per GPU, in a container only those that it may use


class Answer(NamedTuple):
    """The logits float32 [B, K] of a batch, and the largest batch that the worker still computes at once."""

    logits: NDArray[np.float32]
    batch: int


class Halving:
    """Runs inference on batches of at most `batch` images. If memory runs out, it halves this batch and later ones.

    Raises OutOfMemory if there is too little memory for a single image.
    """

    def __init__(self, predictor: Predictor, batch: int) -> None:
        self._predictor, self._batch = predictor, batch

    def __call__(self, images: Pixels) -> Answer:
        x = to_unit(images)
        while True:
            size = min(self._batch, len(x))
            try:
                parts = [self._predictor(x[start : start + size]) for start in range(0, len(x), size)]
            # Python and numpy raise MemoryError, for example while noise is drawn
            except (OutOfMemory, MemoryError) as error:
                if size == 1:
                    raise OutOfMemory(
                        f"out of memory with a single image ({one_line(error)}); free some memory"
                    ) from error
                self._batch = size // 2
            else:
                return Answer(np.concatenate(parts), self._batch)


Submit = Callable[[Pixels], "Future[Answer]"]


class Worker(NamedTuple):
    """The network that a worker opens, and its largest batch. `open` raises errors as `open_predictor` does."""

    bundle: Bundle
    backend: str
    precision: str
    batch: int

    @contextmanager
    def open(self) -> Iterator[Halving]:
        with open_predictor(self.bundle, self.backend, self.precision) as predictor:
            yield Halving(predictor, self.batch)


@contextmanager
def started(worker: Worker, processes: int) -> Iterator[Submit]:
    """Start workers, and provide a function that submits pixels [B, C, H, W] to them, for a with block.

    processes: 1 for a worker in this process, else the number of new processes, each of which sees one GPU, in turn, of
    those in CUDA_VISIBLE_DEVICES or of all. Batches that have not been started when the block ends are dropped. Raises
    InputError if a process dies, and the errors of `Worker.open`.
    """
    with ExitStack() as stack:
        if processes == 1:
            answer = stack.enter_context(worker.open())
            pool = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(pool.shutdown, cancel_futures=True)
            yield lambda images: pool.submit(answer, images)
            return
        context = multiprocessing.get_context("spawn")  # forking a process that has threads is not safe
        turns: SimpleQueue[str | None] = context.SimpleQueue()
        gpus = visible_gpus()
        for i in range(processes):
            turns.put(gpus[i % len(gpus)] if gpus else None)
        workers = stack.enter_context(ProcessPoolExecutor(processes, context, _begin, (worker, turns)))
        stack.callback(workers.shutdown, cancel_futures=True)
        try:
            # all processes start here, with interrupts blocked, because the parent is interrupted too and ends them
            with _interrupts_blocked():
                for _ in range(processes):
                    workers.submit(_open)
            yield lambda images: workers.submit(_answer, images)
        except BrokenProcessPool as error:
            raise InputError(
                "a process died, perhaps killed because memory was short; run again with fewer --processes or a "
                "smaller --batch"
            ) from error


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block interrupts in processes that start within a with block. Does nothing on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def visible_gpus() -> list[str]:
    """Return the values of CUDA_VISIBLE_DEVICES that show one GPU each; an empty list without GPUs."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [gpu for gpu in allowed.split(",") if gpu]
    return [str(i) for i, _ in enumerate(GPUS.iterdir())] if GPUS.is_dir() else []


_worker: Worker  # the worker of this process
_stack = ExitStack()


def _begin(worker: Worker, turns: "SimpleQueue[str | None]") -> None:
    global _worker
    _worker = worker
    gpu = turns.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when its parent ends, so that a killed parent leaves no process that uses GPU memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _halving() -> Halving:
    return _stack.enter_context(_worker.open())


def _open() -> None:
    _halving()


def _answer(images: Pixels) -> Answer:
    return _halving()(images)  # opened again if it failed before, so that the error reaches the parent
