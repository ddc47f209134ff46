"""The figures of one load, for a table and as JSON: throughput, percentiles of latency, errors and CPU time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpdsgr_deploy.serving.load.loops import UNSENT, Load, Tally

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
COLUMNS = ("requests", "images/s", *(f"p{p:g}" for p in PERCENTILES), "errors", "CPU")
LEGEND = "p50 to p99.9: latency in ms. CPU: time of the server in ms per request."
OWN_LIMIT = 0.9  # the share of a CPU core above which the load test itself limits the result


def percentile(seconds: Sequence[float], percent: float) -> float | None:
    """Return a percentile (0 to 100) by linear interpolation; None if less than one value is expected above it."""
    if len(seconds) * (100 - percent) < 100 - 1e-6:
        return None
    return float(np.percentile(np.asarray(seconds), percent))


@dataclass(frozen=True)
class LoadOutcome:
    """The outcome of a load in requests of `batch` images.

    server_cpu: the server's CPU seconds, None if it does not report them; own_cpu: those of this process;
    perf_analyzer: the command line for the same load.
    """

    load: Load
    batch: int
    tally: Tally
    server_cpu: float | None
    own_cpu: float
    perf_analyzer: str

    @property
    def images_per_second(self) -> float:
        """The number of images in good answers within the load's time, per second."""
        return self.tally.in_time * self.batch / self.tally.busy

    @property
    def latency_ms(self) -> dict[str, float | None]:
        """Percentiles of the latency of good answers, which in an open loop counts from when a request was due."""
        seconds = {f"p{p:g}": percentile(self.tally.latencies, p) for p in PERCENTILES}
        return {name: None if value is None else round(1000 * value, 4) for name, value in seconds.items()}

    @property
    def server_cpu_ms(self) -> float | None:
        """The server's CPU milliseconds per finished request; None if the server does not report its CPU time."""
        if self.server_cpu is None or not self.tally.requests:
            return None
        return 1000 * self.server_cpu / self.tally.requests

    @property
    def warnings(self) -> list[str]:
        """Reasons why the figures may not be those of the server."""
        warnings = []
        if (share := self.own_cpu / self.tally.busy) > OWN_LIMIT:
            warnings.append(
                f"{self.load}: this tool took {share:.0%} of a CPU core, so the figures show its limit and not the "
                "server's"
            )
        if unsent := self.tally.errors[UNSENT]:
            warnings.append(
                f"{self.load}: {unsent} requests were due but not sent, because the server was too far behind"
            )
        return warnings

    def row(self) -> list[str]:
        """Return the cells of a table: the load itself, then those below COLUMNS."""
        load = f"{self.load.rate:g}" if self.load.rate else str(self.load.concurrency)
        latency = [_number(value) for value in self.latency_ms.values()]
        errors = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.tally.errors.items())) or "0"
        rate = f"{self.images_per_second:.0f}"
        return [load, str(self.tally.requests), rate, *latency, errors, _number(self.server_cpu_ms)]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        load = {"rate": self.load.rate} if self.load.rate else {"concurrency": self.load.concurrency}
        return {
            "loop": "open" if self.load.rate else "closed",
            **load,
            "seconds": round(self.tally.busy, 4),
            "requests": self.tally.requests,
            "images_per_second": round(self.images_per_second, 2),
            "latency_ms": self.latency_ms,
            "errors": dict(self.tally.errors),
            "server_cpu_ms_per_request": None if self.server_cpu_ms is None else round(self.server_cpu_ms, 4),
            "own_cpu_share": round(self.own_cpu / self.tally.busy, 4),
            "perf_analyzer": self.perf_analyzer,
        }


def _number(value: float | None) -> str:
    """Format a number with about three digits, because further ones would be noise; "-" for None."""
    return "-" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
