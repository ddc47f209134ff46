"""Batch requests without waiting: those that arrive while one batch is computed form the next.

One thread computes for all models; models with waiting requests take turns, so that a busy model delays no other for
long. A batch that takes less time than two thread switches is computed by the event loop itself, once all requests that
the loop has read are queued.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.serving.refusals import Refused, Why
from mpdsgr_deploy.serving.statistics import Statistics

Images = NDArray[np.float32]


class Outputs(NamedTuple):
    """The logits [B, K] and, if requested, the mean firing rates of all L layers [B, L]."""

    logits: NDArray[np.float32]
    rates: NDArray[np.float32] | None = None


QUICK = 1e-3  # seconds for which a batch may block the event loop
STREAK = 20  # number of consecutive quick batches after which batches run in the event loop
Compute = Callable[[Images, bool], Outputs]  # the flag says whether firing rates are computed too


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request in a queue. deadline: on the monotonic clock; a request that waits longer is not computed."""

    images: Images
    rates: bool
    deadline: float
    future: "asyncio.Future[Outputs]"
    arrived: float = field(default_factory=time.monotonic)
    refusal: Refused | None = None  # why its images are refused, set when they are checked


class ModelLane:
    """The queue of one version of a model.

    most: the largest number of images per batch; room: that of images that wait. compute: returns the outputs of a
    batch, or raises if an image is invalid; problem: returns why a request's images are refused, or None.
    """

    def __init__(
        self,
        compute: Compute,
        statistics: Statistics,
        most: int,
        room: int,
        problem: Callable[[Images], Refused | None] = lambda _: None,
    ) -> None:
        self.compute, self.statistics, self.most, self.room, self.problem = compute, statistics, most, room, problem
        self.jobs: deque[QueuedRequest] = deque()
        self.images = 0  # number of images that wait
        self.running = 0  # number of requests that wait or are being computed
        self.streak = 0  # number of consecutive quick batches
        self.quick_images = 0.0  # number of images in a batch that is known to be quick

    @property
    def quick(self) -> bool:
        """Whether the event loop may compute the next batch; not one with firing rates, which may open a network."""
        return self.streak >= STREAK and min(self.images, self.most) <= self.quick_images and not self.jobs[0].rates

    def close(self) -> None:
        """Drop the network, which refers to this lane; the cycle would stay in memory until a garbage collection."""
        self.compute = _closed

    def learn(self, images: int, seconds: float) -> None:
        """Update `quick_images`, which at most doubles, from the number of images and the seconds of a batch."""
        if seconds >= QUICK:
            self.streak, self.quick_images = 0, 0.0
            return
        self.streak += 1
        self.quick_images = max(self.quick_images, images * min(2.0, QUICK / max(seconds, 1e-9)))

    def take(self) -> tuple[list[QueuedRequest], list[QueuedRequest]]:
        """Remove the next batch from the queue, and requests that are late or cancelled, and return both."""
        batch: list[QueuedRequest] = []
        dropped: list[QueuedRequest] = []
        images, now = 0, time.monotonic()
        while self.jobs:
            job = self.jobs[0]
            if not (job.future.done() or now > job.deadline):
                if batch and (images + len(job.images) > self.most or job.rates != batch[0].rates):
                    break
                images += len(job.images)
                batch.append(job)
            else:
                dropped.append(job)
            self.jobs.popleft()
            self.images -= len(job.images)
        return batch, dropped


class Batcher:
    """Computes requests in a thread, for the event loop in which it was constructed, until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = threading.Condition()
        self._turns: deque[ModelLane] = deque()  # lanes that have jobs
        # busy: the thread is computing; called: a call of `_turn` is scheduled
        self._closed = self._busy = self._called = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def submit(
        self, lane: ModelLane, images: Images, deadline: float, *, rates: bool = False
    ) -> "asyncio.Future[Outputs]":
        """Return a future of the outputs of images [B <= lane.most, C, H, W], which can be cancelled.

        The future raises Refused if the deadline passes first. Raises Refused at once if the lane is full.
        """
        job = QueuedRequest(images, rates, deadline, self._loop.create_future())
        with self._ready:
            # an empty queue takes any request, so that one larger than `room` can be answered too
            if lane.images and lane.images + len(images) > lane.room:
                lane.statistics.dropped["queue_full"] += 1
                raise Refused(
                    Why.BUSY,
                    f"the queue is full: {lane.images} images are waiting, and {lane.room} may wait; try again later",
                )
            if not lane.jobs:
                self._turns.append(lane)
            lane.jobs.append(job)
            lane.images += len(images)
            lane.running += 1
            if self._busy or not lane.quick:
                self._ready.notify()
            elif not self._called:
                self._called = True
                self._loop.call_soon(self._turn)
        return job.future

    def _turn(self) -> None:
        """Compute a batch of a quick lane in the event loop, unless the thread has taken it meanwhile."""
        self._called = False
        with self._ready:
            turn = None if self._busy or self._closed else self._next(quick=True)
            if self._turns and not self._busy:
                if all(lane.quick for lane in self._turns):
                    self._called = True
                    self._loop.call_soon(self._turn)  # first let the loop read what has arrived meanwhile
                else:
                    self._ready.notify()
        if turn is not None:
            _deliver(*turn, *_timed(*turn))

    def _next(self, *, quick: bool) -> tuple[ModelLane, list[QueuedRequest], list[QueuedRequest]] | None:
        """Return the lane whose turn it is, its next batch and dropped requests; with `quick`, None if it is not."""
        if not self._turns or (quick and not self._turns[0].quick):
            return None
        lane = self._turns.popleft()
        batch, dropped = lane.take()
        if lane.jobs:
            self._turns.append(lane)
        return lane, batch, dropped

    def close(self) -> None:
        """End the thread; nothing more is computed."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._step():  # keep no reference to a lane between two steps: its model may have been replaced
            pass

    def _step(self) -> bool:
        """Wait for requests and compute a batch of them. Returns False after `close`."""
        with self._ready:
            self._busy = False
            turn = None
            while turn is None:
                if self._closed:
                    return False
                turn = self._next(quick=False)
                if turn is None:
                    self._ready.wait()
            self._busy = True
        outcome = _timed(*turn)
        with suppress(RuntimeError):  # the event loop has stopped
            self._loop.call_soon_threadsafe(_deliver, *turn, *outcome)
        return True


def _closed(images: Images, rates: bool) -> Outputs:
    raise RuntimeError("the network is closed")


def _timed(
    lane: ModelLane, batch: list[QueuedRequest], _: list[QueuedRequest]
) -> tuple[Outputs | Exception | None, float, float]:
    """Compute a batch; return its outputs or error (None: an empty batch), its start time, and its seconds."""
    start = time.monotonic()
    outcome = _computed(lane, batch) if batch else None
    return outcome, start, time.monotonic() - start


def _computed(lane: ModelLane, batch: list[QueuedRequest]) -> Outputs | Exception:
    """Compute a batch. If that fails, set the refusals of invalid requests and compute the others."""
    images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
    try:
        return lane.compute(images, batch[0].rates)
    except Exception as error:  # any error belongs to these requests and must not end the thread
        for job in batch:
            job.refusal = lane.problem(job.images)
        valid = [job for job in batch if job.refusal is None]
        if not valid:  # each request gets its refusal; the frames of this error would keep the images in memory
            return error.with_traceback(None)
        return error if len(valid) == len(batch) else _computed(lane, valid)


def _deliver(
    lane: ModelLane,
    batch: list[QueuedRequest],
    dropped: list[QueuedRequest],
    outcome: Outputs | Exception | None,
    start: float,
    seconds: float,
) -> None:
    """Resolve, in the event loop, the future of each request with its rows of the outputs or with an error."""
    lane.running -= len(batch) + len(dropped)
    for job in dropped:
        lane.statistics.dropped["cancelled" if job.future.cancelled() else "deadline"] += 1
        if not job.future.done():
            waited = start - job.arrived
            job.future.set_exception(
                Refused(
                    Why.LATE,
                    f"the request's deadline passed after it had waited {waited:.3f} s in the queue; "
                    "allow more time or send fewer requests",
                )
            )
    valid = [job for job in batch if job.refusal is None]
    for job in batch:
        if job.refusal is not None and not job.future.done():
            job.future.set_exception(job.refusal)
    if isinstance(outcome, Outputs):  # dropped and refused requests say nothing about the network's speed
        images = sum(len(job.images) for job in valid)
        lane.learn(images, seconds)
        lane.statistics.computed([start - job.arrived for job in valid], images, seconds)
    row = 0
    for job in valid:
        rows = slice(row, row + len(job.images))
        row = rows.stop
        if job.future.done():  # the request was cancelled meanwhile
            continue
        if isinstance(outcome, Outputs):
            rates = None if outcome.rates is None else outcome.rates[rows]
            job.future.set_result(Outputs(outcome.logits[rows], rates))
        elif outcome is not None:
            job.future.set_exception(outcome)
