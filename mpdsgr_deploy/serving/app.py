"""The state and life cycle of a server, independent of its listeners: those of this package, or that of Ray Serve."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

from mpdsgr_deploy import __version__
from mpdsgr_deploy.allocator import return_free_pages
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.provenance import hardware
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.serving.batcher import Batcher
from mpdsgr_deploy.serving.figures import Figures, statistics_extension, status
from mpdsgr_deploy.serving.group import Group, ProcessCounts
from mpdsgr_deploy.serving.logs import RequestLog, log_request
from mpdsgr_deploy.serving.refusals import Refused, Why
from mpdsgr_deploy.serving.repository import Repository
from mpdsgr_deploy.serving.security import ApiKeys
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.settings import ServerSettings
from mpdsgr_deploy.serving.source import sources
from mpdsgr_deploy.serving.tensors import too_large

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]


class Memory:
    """Counts the bytes that requests in progress hold, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def share(self) -> "Share":
        """Return the share of one request, which the end of a with block releases."""
        return Share(self)


class Share:
    """The memory that one request holds."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.held = memory, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._memory.used -= self.held

    def take(self, count: int) -> None:
        """Reserve `count` more bytes. Raises Refused if they are not free, or exceed the limit."""
        memory = self._memory
        if self.held + count > memory.limit:
            raise too_large(memory.limit)
        if memory.used + count > memory.limit:
            raise Refused(Why.BUSY, "the requests in memory have reached limits.in_flight_bytes; try again later")
        memory.used += count
        self.held += count


class Server:
    """The served models, their limits and the state of the server. Call `start` and `close` in one event loop.

    models: each as `[NAME=]BUNDLE[@PRECISION]`. keys: a file of API keys; None: no key is needed. repository_control:
    requests may load and unload models. group: the server's processes, including this one. Raises InputError for a name
    that is invalid or appears twice, for an unusable file of keys, and for repository_control with several processes.
    """

    def __init__(
        self,
        models: Sequence[str],
        settings: ServerSettings | None = None,
        *,
        backend: str = DEFAULT_BACKEND,
        keys: Path | None = None,
        repository_control: bool = False,
        group: Group | None = None,
    ) -> None:
        self.settings, self.group = settings or ServerSettings(), group or Group()
        self.limits = self.settings.limits.share(self.group.processes)
        self.keys = None if keys is None else ApiKeys(keys)
        if repository_control and self.group.processes > 1:
            raise InputError("--repository-control needs --processes 1, because a request reaches only one process")
        self.repository_control = repository_control
        cores = max(1, hardware()["cores"] // self.group.processes)
        named = sources(models, self.settings.trust.demand())
        self.repository = Repository(named, backend, self.limits, cores, self.group)
        self.memory = Memory(self.limits.in_flight_bytes)
        # (protocol, status) -> answers to requests that name no model
        self.other_codes: Counter[tuple[str, str]] = Counter()
        self.grpc_port: int | None = None  # set once a server listens there
        self.draining = False  # the server is stopping, but still answers
        self.local = False  # only this machine can reach the server, and no keys are needed
        self.closing = False  # open connections get their last answers
        self._born = time.monotonic()
        self._ids = map(f"{token_hex(4)}-{{:x}}".format, itertools.count(1))

    @property
    def largest_message(self) -> int:
        """The size in bytes of the largest gRPC inference request that is valid for any model and within the limits."""
        return min(self.repository.largest_message, self.memory.limit)

    async def start(self) -> None:
        """Load every model. Raises MpdsgrError if one of them cannot serve."""
        self.batcher = Batcher()
        self._tidying = asyncio.create_task(return_free_pages())
        await self.repository.load_all()
        self.counts.loaded = 1

    async def close(self) -> None:
        """Answer the accepted requests, then free the models."""
        self._tidying.cancel()
        await self.repository.close()
        await asyncio.to_thread(self.batcher.close)

    @property
    def counts(self) -> ProcessCounts:
        """The counts that this process shows to the others of the group."""
        return self.group.own

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send requests: the server is not stopping, and every process has started.

        A process has started once each of its models has answered its golden batch; it may have unloaded some since.
        """
        return self.group.loaded and not self.draining

    def new_id(self) -> str:
        """Return a new identifier for a request without one."""
        return next(self._ids)

    def authorize(self, authorization: str) -> None:
        """Raise Refused if keys are needed and this Authorization header holds none of them."""
        if self.keys is not None and not self.keys.accepts(authorization):
            raise Refused(
                Why.UNAUTHENTICATED,
                "this server requires an API key; send the header Authorization: Bearer KEY",
                headers={"www-authenticate": 'Bearer realm="mpdsgr"'},
            )

    def count(self, protocol: str, request: RequestLog, code: str, refused: Refused | None) -> None:
        """Count an answered request, and log it if it was refused or if every request is logged.

        protocol: "http" or "grpc". code: its status in that protocol.
        """
        codes = self.other_codes
        if request.model is not None:
            codes = request.model.statistics.codes
            request.model.statistics.failed += refused is not None
        codes[protocol, code] += 1
        if refused is not None or self.settings.log.requests:
            log_request(protocol, request, code, refused)

    async def require_same_bundles(self) -> None:
        """Raise InputError if another process serves a different bundle under the name of a model."""
        for figures in (await self.group.ask("figures")).values():
            for name, other in figures.items():
                model = self.repository.entry(name).model
                if model is not None and model.digest != other.digest:
                    raise InputError(
                        f"{model.source.path} is not the bundle that is served as {name!r}; send SIGHUP to switch to it"
                    )

    def require_control(self) -> None:
        """Raise Refused if requests may not load and unload models."""
        if not self.repository_control:
            raise Refused(
                Why.FORBIDDEN,
                "this server does not load or unload models on request; start it with --repository-control to allow it",
            )

    def metadata(self) -> dict[str, Any]:
        """Return the server's metadata in the JSON form of the protocol."""
        return {"name": "mpdsgr-deploy", "version": __version__, "extensions": EXTENSIONS}

    def index(self, *, ready: bool) -> list[dict[str, str]]:
        """Return the repository index of the protocol for all models, or with `ready` for those that are loaded."""
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

    async def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Return the statistics extension for one model, or for all that are loaded, summed over all processes.

        Raises Refused for an unknown name or version.
        """
        if name:
            models = [self.repository.model(name, version)]
        else:
            models = [entry.model for entry in self.repository if entry.model]
        others = await self.group.ask("figures")
        return {"model_stats": [statistics_extension(model, _of(model, others)) for model in models]}

    async def status(self) -> dict[str, Any]:
        """Return the data of the status page, summed over all processes."""
        others = await self.group.ask("figures")
        server = {
            "version": __version__,
            "uptime_seconds": time.monotonic() - self._born,
            "ready": self.ready,
            "processes": len(others) + 1,
        }
        models = [status(entry, self.repository.backend, _of(entry.model, others)) for entry in self.repository]
        return {"server": server, "models": models}

    async def figures(self) -> dict[str, Figures]:
        """Return this process's figures by model, for the other processes to sum."""
        models = [entry.model for entry in self.repository if entry.model]
        return {model.source.name: Figures(model.digest, model.statistics, model.lane.images) for model in models}


def _of(model: ServedModel | None, others: Mapping[int, Mapping[str, Figures]]) -> list[Figures]:
    """Return the other processes' figures for the same bundle under the same name."""
    if model is None:
        return []
    same_name = (figures.get(model.source.name) for figures in others.values())
    return [figures for figures in same_name if figures and figures.digest == model.digest]
