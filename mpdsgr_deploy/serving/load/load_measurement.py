"""Measure a running server: ask it for a model's inputs, put load on it, and summarise the answers.

The figures of a load are its throughput, percentiles of latency, errors and CPU time.
"""

import asyncio
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import LINE_EVERY, log
from mpdsgr_deploy.runtime.remote import ModelUrl, excerpt
from mpdsgr_deploy.serving.load.connection import Connection, Endpoint, NoAnswer
from mpdsgr_deploy.serving.load.loops import UNSENT, Load, Tally, Traffic, run
from mpdsgr_deploy.serving.load.target_model import TargetModel, describe

CPU_SECONDS = re.compile(rb"^process_cpu_seconds_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)
WARM_UP = 0.1  # the warm-up's share of a load's seconds (at most one second) and requests
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


@dataclass
class LoadMeasurement:
    """The outcomes of a measurement: of all loads after `measure`, or of those before an interrupt."""

    model: TargetModel | None = None
    outcomes: list[LoadOutcome] = field(default_factory=list)


def measure(
    url: str,
    loads: Sequence[Load],
    measurement: LoadMeasurement,
    *,
    batch: int = 1,
    images: NDArray[Any] | None = None,
    seed: int = 0,
    key: str | None = None,
) -> None:
    """Put each of `loads` on the model at `url` (http://HOST:PORT/v2/models/NAME), and add to `measurement`.

    batch: the number of images per request. images: uint8, or float32 in [0, 1], [N, C, H, W]; None: random images from
    `seed`. key: an API key, sent as a bearer token. KeyboardInterrupt is raised after the interrupted load has been
    added to `measurement`.

    Raises InputError for an invalid URL, and if the server cannot be reached or does not answer the first request with
    the model's output.
    """
    endpoint = Endpoint(ModelUrl.split(url), {"Authorization": f"Bearer {key}"} if key else {})
    with asyncio.Runner(loop_factory=need("uvloop", "serve").new_event_loop) as runner:
        runner.run(_measure(url, endpoint, loads, measurement, batch, images, seed))


async def _measure(
    url: str,
    endpoint: Endpoint,
    loads: Sequence[Load],
    measurement: LoadMeasurement,
    batch: int,
    images: NDArray[Any] | None,
    seed: int,
) -> None:
    model = measurement.model = await describe(url, endpoint)
    requests = model.requests(batch, images, seed)
    await _try(model, requests[0], batch)

    def traffic() -> Traffic:
        return Traffic(endpoint, requests, lambda answer: model.problem(answer, batch))

    for load in loads:
        log.info("%s: %g s, %d requests at most", load, load.seconds, load.requests)
        warm_up = Load(min(1.0, WARM_UP * load.seconds), int(WARM_UP * load.requests), load.concurrency, load.rate)
        await run(warm_up, traffic(), seed + 1)
        before = await _cpu_seconds(endpoint)
        counted, own_start, after = traffic(), time.process_time(), None
        progress = asyncio.create_task(_tell(load, counted.tally))
        try:
            await run(load, counted, seed)
            after = await _cpu_seconds(endpoint)
        finally:  # add the figures after an interrupt, too
            own_cpu = time.process_time() - own_start
            progress.cancel()
            server_cpu = None if before is None or after is None else after - before
            command = perf_analyzer(model, load, batch)
            measurement.outcomes.append(LoadOutcome(load, batch, counted.tally, server_cpu, own_cpu, command))
        log.info(
            "%s: %d requests, %.0f images/s", load, counted.tally.requests, measurement.outcomes[-1].images_per_second
        )


async def _tell(load: Load, tally: Tally) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY)
        log.info("%s: %d requests, %d errors so far", load, tally.requests, tally.errors.total())


async def _try(model: TargetModel, request: bytes, batch: int) -> None:
    """Send one request before the load, because the server's message says more than a count of errors.

    Raises InputError unless it is answered correctly.
    """
    connection = Connection(model.endpoint)
    try:
        answer = await connection.ask(request)
    except NoAnswer as error:
        raise InputError(f"{model.url} does not answer a request of {batch} images: {one_line(error)}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise InputError(f"{model.url} answers {answer.status} to {batch} images: {excerpt(answer.body)}")
    if model.problem(answer, batch):
        raise InputError(f"{model.url} does not return {model.output.name!r} for each of {batch} images")


async def _cpu_seconds(endpoint: Endpoint) -> float | None:
    """Return the CPU seconds of all processes of the server, from its Prometheus page; None without such figures."""
    connection = Connection(endpoint)
    try:
        page = await connection.ask(endpoint.message("GET", endpoint.at.root.removesuffix("/v2") + "/metrics"))
        values = CPU_SECONDS.findall(page.body) if page.status == 200 else []
        return sum(map(float, values)) if values else None
    except (NoAnswer, ValueError):
        return None
    finally:
        connection.close()


def perf_analyzer(model: TargetModel, load: Load, batch: int) -> str:
    """Return the command line of Triton's perf_analyzer for the same load, which measures until its windows agree."""
    at = model.endpoint.at
    name, _, version = at.path.removeprefix(at.root + "/models/").partition("/versions/")
    prefix = at.root.removesuffix("/v2")
    words = ["perf_analyzer", "-m", name, *(["-x", version] if version else [])]
    words += ["-u", f"{'https://' if at.tls else ''}{model.endpoint.authority}{prefix}", "-i", "http", "-b", str(batch)]
    if load.rate:
        words += [f"--request-rate-range={load.rate:g}", "--request-distribution=poisson"]
    else:
        words += [f"--concurrency-range={load.concurrency}"]
    words += [f"--measurement-interval={1000 * load.seconds:.0f}", "--percentile=99"]
    for tensor in model.inputs:
        if -1 not in tensor.shape:
            words += [f"--shape={tensor.name}:{','.join(map(str, tensor.shape))}"]
    if not model.binary:
        words += ["--input-tensor-format=json", "--output-tensor-format=json"]
    command = shlex.join(words)
    return command + (' -H "Authorization: Bearer $KEY"' if model.endpoint.headers else "")
