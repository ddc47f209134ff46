"""The counts of one version of a model, for the statistics extension, /status and /metrics."""

import time
from bisect import bisect_left
from collections import Counter, deque
from typing import NamedTuple

# bounds in seconds, each about twice the one before, from the time of a small network to longer than anybody waits
SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0, 16.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WINDOW = 60.0  # seconds for which requests count as recent


class Histogram:
    """The counts of values up to each bound but above the one before, and of those above the last; and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class Moment(NamedTuple):
    """An answered request: its end on the monotonic clock, its duration in seconds, and its number of images."""

    end: float
    seconds: float
    images: int


class Statistics:
    """The counts of one version of a model. Only the event loop writes."""

    def __init__(self) -> None:
        self.codes: Counter[tuple[str, str]] = Counter()  # (protocol, status) -> answers
        # reason (deadline, cancelled, queue_full) -> requests that were not computed
        self.dropped: Counter[str] = Counter()
        self.request, self.queue, self.inference = (Histogram(SECONDS) for _ in range(3))
        self.batch = Histogram(IMAGES)
        self.images = self.failed = 0
        self.last_inference_ms = 0  # milliseconds since 1970
        self.recent: deque[Moment] = deque(maxlen=2048)

    def answered(self, seconds: float, images: int) -> None:
        """Count a request whose outputs were computed, `seconds` after its arrival."""
        self.request.add(seconds)
        self.recent.append(Moment(time.monotonic(), seconds, images))

    def computed(self, waits: list[float], images: int, seconds: float) -> None:
        """Count a batch that was computed in `seconds`. waits: the seconds that each of its requests waited."""
        for wait in waits:
            self.queue.add(wait)
        self.batch.add(images)
        self.inference.add(seconds)
        self.images += images
        self.last_inference_ms = int(time.time() * 1000)
