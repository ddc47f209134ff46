"""The two kinds of load: a closed loop of users who wait for their answers, and an open loop of Poisson arrivals."""

import asyncio
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from mpdsgr_deploy.serving.load.connection import Connection, Endpoint, HttpAnswer, NoAnswer

PAUSE = 0.1  # seconds before a user whose connection broke tries again
MOST_CONNECTIONS = 512  # the largest number of connections of an open loop
UNSENT = "unsent"  # the kind of error of a request that was due but could not be sent within the load's time


@dataclass(frozen=True)
class Load:
    """A load: `concurrency` users in a closed loop or, if it is not 0, `rate` requests per second in an open loop.

    It ends after `seconds` or `requests`, whichever comes first, once the requests that were sent have been answered.
    """

    seconds: float
    requests: int
    concurrency: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.rate:g} per second" if self.rate else f"concurrency {self.concurrency}"


@dataclass
class Tally:
    """The result of a load.

    latencies: the seconds of each good answer; in_time: the number of good answers within the load's time; errors:
    counts by kind; started, ended: on the monotonic clock, the latter that of the last answer within the load's time.
    """

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    in_time: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    started: float = 0.0
    ended: float = 0.0
    sent: int = 0

    @property
    def requests(self) -> int:
        """The number of finished requests, with a good answer or an error."""
        return len(self.latencies) + self.errors.total() - self.errors[UNSENT]

    @property
    def busy(self) -> float:
        """The seconds from the start to the last answer within the load's time."""
        return max(self.ended - self.started, 1e-6)


class Traffic:
    """Sends encoded requests in turn and keeps the tally. problem: returns the kind of error; None: a good answer."""

    def __init__(
        self, endpoint: Endpoint, requests: Sequence[bytes], problem: Callable[[HttpAnswer], str | None]
    ) -> None:
        self.endpoint, self.tally = endpoint, Tally()
        self._requests: Iterator[bytes] = cycle(requests)
        self._problem = problem

    def start(self, seconds: float) -> float:
        """Start the clock, and return the time on the monotonic clock at which the load ends."""
        self.tally.started = self.tally.ended = time.monotonic()
        self._stop = self.tally.started + seconds
        return self._stop

    async def exchange(self, connection: Connection, due: float) -> bool:
        """Send one request and return whether an answer came. due: the time from which its latency counts."""
        tally, kind = self.tally, None
        tally.sent += 1
        try:
            kind = self._problem(answer := await connection.ask(next(self._requests)))
        except NoAnswer as error:
            answer, kind = None, error.kind
        now = time.monotonic()
        if now <= self._stop:
            tally.ended = now
            tally.in_time += kind is None
        if kind is None:
            tally.latencies.append(now - due)
        else:
            tally.errors[kind] += 1
        return answer is not None


def arrivals(load: Load, seed: int) -> Iterator[float]:
    """Yield the seconds from the start of an open loop at which its requests are due, a Poisson process."""
    generator, due = np.random.default_rng(seed), 0.0
    for _ in range(load.requests):
        due += generator.exponential(1 / load.rate)
        if due > load.seconds:
            return
        yield due


async def run(load: Load, traffic: Traffic, seed: int) -> None:
    """Put `load` on the server; `traffic.tally` holds the result, even if this is cancelled."""
    await (_OpenLoop(traffic).run(load, seed) if load.rate else _closed(load, traffic))


async def _closed(load: Load, traffic: Traffic) -> None:
    connections = [Connection(traffic.endpoint) for _ in range(load.concurrency)]

    async def user(connection: Connection) -> None:
        while traffic.tally.sent < load.requests and time.monotonic() < stop:
            if not await traffic.exchange(connection, time.monotonic()):
                await asyncio.sleep(PAUSE)

    try:
        await asyncio.gather(*(connection.open() for connection in connections), return_exceptions=True)
        stop = traffic.start(load.seconds)
        async with asyncio.TaskGroup() as users:
            for connection in connections:
                users.create_task(user(connection))
    finally:
        for connection in connections:
            connection.close()


class _OpenLoop:
    """Sends requests when they are due, each on an idle or new connection.

    A separate thread signals when one is due, because timers of the event loop have a resolution of a millisecond.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self._loop = traffic, asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._backlog: deque[float] = deque()  # due times of requests that are not sent yet
        self._idle: list[asyncio.Future[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self._connections: list[Connection] = []

    async def run(self, load: Load, seed: int) -> None:
        end = self._traffic.start(load.seconds)
        try:
            await asyncio.to_thread(self._tell, load, seed)
            while self._backlog and time.monotonic() < end:
                await asyncio.sleep(0.01)
            self._stopped.set()
            if self._backlog:
                self._traffic.tally.errors[UNSENT] = len(self._backlog)
                self._backlog.clear()
            for future in self._idle:
                future.set_result(None)
            await asyncio.gather(*self._workers)
        finally:
            self._stopped.set()
            for task in self._workers:
                task.cancel()
            for connection in self._connections:
                connection.close()

    def _tell(self, load: Load, seed: int) -> None:
        for seconds in arrivals(load, seed):
            due = self._traffic.tally.started + seconds
            if self._stopped.wait(max(0.0, due - time.monotonic())):
                return
            self._loop.call_soon_threadsafe(self._arrive, due)

    def _arrive(self, due: float) -> None:
        if self._stopped.is_set():
            return
        self._backlog.append(due)
        if self._idle:
            self._idle.pop().set_result(None)
        elif len(self._workers) < MOST_CONNECTIONS:
            self._connections.append(Connection(self._traffic.endpoint))
            self._workers.append(self._loop.create_task(self._work(self._connections[-1])))

    async def _work(self, connection: Connection) -> None:
        while True:
            while self._backlog:
                await self._traffic.exchange(connection, self._backlog.popleft())
            if self._stopped.is_set():
                return
            self._idle.append(self._loop.create_future())
            await self._idle[-1]
