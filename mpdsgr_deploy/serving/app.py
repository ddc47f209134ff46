"""A server's state and life, whatever listens for it: HTTP and gRPC here, Ray Serve elsewhere."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpdsgr_deploy import __version__
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.serving.batcher import Batcher
from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.logs import RequestLog, log_request
from mpdsgr_deploy.serving.model import ServedModel
from mpdsgr_deploy.serving.repository import Entry, Repository
from mpdsgr_deploy.serving.security import ApiKeys
from mpdsgr_deploy.serving.settings import ServerSettings
from mpdsgr_deploy.serving.source import sources
from mpdsgr_deploy.serving.statistics import WINDOW
from mpdsgr_deploy.serving.tensors import too_large

ENOUGH = 100  # requests for one of them to be above the 99th percentile
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]


class Memory:
    """Bytes that requests take up, of `limit` in all."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """One request's, given back at the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            self.used -= share.held


class Share:
    """What one request holds of the memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.held = memory, 0

    def take(self, count: int) -> None:
        """So many bytes more. Raises Refused if they are not free now, or never will be."""
        memory = self._memory
        if self.held + count > memory.limit:
            raise too_large(memory.limit)
        if memory.used + count > memory.limit:
            raise Refused(Why.BUSY, "too many bytes of requests are in memory; try again soon")
        memory.used += count
        self.held += count


class Server:
    """Models and limits, and whether it is ready. `start` in a running event loop, then `close` there.

    models: `[NAME=]BUNDLE[@PRECISION]` each. Raises InputError for names that are none or come twice.
    """

    def __init__(
        self,
        models: Sequence[str],
        settings: ServerSettings | None = None,
        *,
        backend: str = DEFAULT_BACKEND,
        keys: Path | None = None,
        repository_control: bool = False,
    ) -> None:
        self.settings = settings or ServerSettings()
        self.limits = self.settings.limits
        self.keys = None if keys is None else ApiKeys(keys)
        self.repository_control = repository_control
        self.repository = Repository(sources(models, self.settings.trust.demand()), backend, self.limits)
        self.memory = Memory(self.limits.in_flight_bytes)
        self.other_codes: Counter[tuple[str, str]] = Counter()  # of requests that reached no model, by protocol, status
        self.connections = self.requests = 0  # open now; in work now
        self.grpc_port: int | None = None  # once something listens there
        self.draining = False  # it ends, and still answers
        self.local = False  # it is for this machine alone, and asks nobody who they are
        self.closing = False  # connections that are open get their last answer
        self._born = time.monotonic()

    @property
    def largest_message(self) -> int:
        """Bytes of the largest valid inference request over gRPC, of any model."""
        return min(self.repository.largest_message, self.memory.limit)

    async def start(self) -> None:
        """Load every model. Raises MpdsgrError if one cannot serve."""
        self.batcher = Batcher()
        await self.repository.load_all()

    async def close(self) -> None:
        """Answer what was accepted, then free the models."""
        await self.repository.close()
        await asyncio.to_thread(self.batcher.close)

    @property
    def ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return self.repository.ready and not self.draining

    def authorize(self, authorization: str) -> None:
        """Raise Refused unless no keys are needed or this names one."""
        if self.keys is not None and not self.keys.accepts(authorization):
            raise Refused(
                Why.UNAUTHENTICATED,
                "give an API key: Authorization: Bearer KEY",
                headers={"www-authenticate": 'Bearer realm="mpdsgr"'},
            )

    def count(self, protocol: str, request: RequestLog, code: str, refused: Refused | None) -> None:
        """A request was answered, by whatever protocol: into the statistics, and the log if that is wanted."""
        codes = self.other_codes
        if request.model is not None:
            codes = request.model.statistics.codes
            request.model.statistics.failed += refused is not None
        codes[protocol, code] += 1
        if refused is not None or self.settings.log.requests:
            log_request(protocol, request, code, refused)

    def require_control(self) -> None:
        """Raise Refused where models may not be loaded and unloaded by request."""
        if not self.repository_control:
            raise Refused(Why.FORBIDDEN, "start the server with --repository-control to load and unload models")

    def metadata(self) -> dict[str, Any]:
        """Of the server, as the protocol has it."""
        return {"name": "mpdsgr-deploy", "version": __version__, "extensions": EXTENSIONS}

    def index(self, *, ready: bool) -> list[dict[str, str]]:
        """The repository index; with `ready`, of models that answer."""
        return [
            {
                "name": entry.source.name,
                "version": entry.model.version if entry.model else "",
                "state": entry.state,
                "reason": entry.reason,
            }
            for entry in self.repository
            if entry.model is not None or not ready
        ]

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """The statistics extension, of one model or of all that answer."""
        if name:
            models = [self.repository.model(name, version)]
        else:
            models = [entry.model for entry in self.repository if entry.model]
        return {"model_stats": [_statistics(model) for model in models]}

    def status(self) -> dict[str, Any]:
        """What the page shows."""
        server = {"version": __version__, "uptime_seconds": time.monotonic() - self._born, "ready": self.ready}
        return {"server": server, "models": [_status(entry, self.repository.backend) for entry in self.repository]}


def _statistics(model: ServedModel) -> dict[str, Any]:
    counts = model.statistics

    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    return {
        "name": model.source.name,
        "version": model.version,
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.images,
        "execution_count": counts.batch.count,
        "inference_stats": {
            "success": duration(counts.request.count, counts.request.sum),
            "fail": duration(counts.failed, 0),
            "queue": duration(counts.queue.count, counts.queue.sum),
            "compute_input": duration(counts.batch.count, 0),
            "compute_infer": duration(counts.batch.count, counts.inference.sum),
            "compute_output": duration(counts.batch.count, 0),
        },
    }


def _status(entry: Entry, backend: str) -> dict[str, Any]:
    source, model = entry.source, entry.model
    status: dict[str, Any] = {
        "name": source.name,
        "version": model.version if model else "",
        "state": entry.state,
        "reason": entry.reason,
        "precision": source.precision,
        "backend": backend,
    }
    if model is None:
        return status
    counts, now = model.statistics, time.monotonic()
    recent = [moment for moment in counts.recent if now - moment.end < WINDOW]
    # the buffer may reach less far back than the window
    span = WINDOW if len(recent) < len(counts.recent) else now - min((m.end - m.seconds for m in recent), default=now)
    times = sorted(moment.seconds * 1000 for moment in recent)
    return {
        **status,
        "input": {"name": model.input.name, "shape": list(model.input.shape)},
        "labels": list(model.labels),
        **model.evidence,
        "firing_rate_layers": list(model.layers),
        "queued_images": model.lane.images,
        "inferences": counts.images,
        "errors": counts.failed,
        "recent": {
            "seconds": span,
            "requests_per_second": len(recent) / span if recent else 0.0,
            "images_per_second": sum(m.images for m in recent) / span if recent else 0.0,
            "latency_ms": _percentiles(times),
        },
    }


def _percentiles(times: list[float]) -> dict[str, float | None] | None:
    """Of sorted times; None for a percentile that too few of them stand behind."""
    if not times:
        return None
    return {"p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)] if len(times) >= ENOUGH else None}
