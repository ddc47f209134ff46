"""The served models by name: load them, replace them by a newer version of their bundle, unload them.

An old version serves until the new one is open and has answered its golden batch, and is closed once its accepted
requests are answered. If the new version fails, the old one goes on serving.
"""

import asyncio
from collections.abc import Iterator, Sequence

from mpdsgr_deploy.errors import one_line
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.serving.group import Group
from mpdsgr_deploy.serving.refusals import Refused, Why
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.settings import Limits
from mpdsgr_deploy.serving.source import ModelSource
from mpdsgr_deploy.serving.tensors import JSON_ENVELOPE, ImageInput

LOADING, READY, UNAVAILABLE = "LOADING", "READY", "UNAVAILABLE"


class Entry:
    """A name under which a model is served.

    model: the version that answers, if any; state: LOADING, READY or UNAVAILABLE; reason: why no model answers, or why
    the last load failed; loads, failed_loads: their numbers.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.model: ServedModel | None = None
        self.state, self.reason = LOADING, "not loaded yet"
        self.loads = self.failed_loads = 0
        self.lock = asyncio.Lock()


class Repository:
    """All models of a server. backend: that of all networks; cores: the number that a network may use.

    group: shows the other processes of the server that a network is being opened.
    """

    def __init__(self, sources: Sequence[ModelSource], backend: str, limits: Limits, cores: int, group: Group) -> None:
        self.backend, self._limits, self._cores, self._group = backend, limits, cores, group
        self._entries = {source.name: Entry(source) for source in sources}
        self.largest_message = max((_message_bytes(source, limits.batch) for source in sources), default=JSON_ENVELOPE)
        self._draining: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def entry(self, name: str) -> Entry:
        """Return the entry of a name. Raises Refused if nothing is served under it."""
        try:
            return self._entries[name]
        except KeyError:
            raise Refused(Why.NOT_FOUND, f"there is no model {name[:100]!r}") from None

    def model(self, name: str, version: str = "") -> ServedModel:
        """Return the model that answers now. version: "" for any. Raises Refused if there is no such model."""
        entry = self.entry(name)
        if entry.model is None:
            why = Why.NOT_READY if entry.state == LOADING else Why.NOT_FOUND
            raise Refused(why, f"model {name!r} is not ready: {entry.reason}")
        if version not in ("", entry.model.version):
            raise Refused(Why.NOT_FOUND, f"model {name!r} has version {entry.model.version}, not {version[:100]!r}")
        return entry.model

    async def load_all(self) -> None:
        """Open all models, one after the other. Raises the errors of `ServedModel`."""
        for entry in self:
            await self._load(entry)

    async def load(self, name: str) -> None:
        """Open a model's bundle on disk and switch to it. Raises Refused if it cannot serve; the old version stays.

        The path is the one with which the server was started, never one from a request.
        """
        try:
            await self._load(self.entry(name))
        except Refused:
            raise
        except Exception as error:  # a backend may raise any type for a damaged file
            raise Refused(Why.INVALID, f"cannot load model {name!r}: {one_line(error)}") from None

    async def reload_changed(self) -> None:
        """Load every model whose bundle on disk differs from the served one; failures are logged."""
        for entry in self:
            if entry.model is None or entry.source.on_disk().get("digest") != entry.model.digest:
                try:
                    await self._load(entry)
                except Exception as error:  # a backend may raise any type for a damaged file
                    log.error("model %s: %s", entry.source.name, one_line(error))

    async def _load(self, entry: Entry) -> None:
        async with entry.lock:
            entry.state = LOADING if entry.model is None else entry.state
            entry.reason = "loading"
            settings = None if entry.model is None else entry.model.settings
            self._group.own.opening += 1
            try:
                place = self.backend, self._limits, self._cores
                model = await asyncio.to_thread(ServedModel, entry.source, *place, settings)
            except BaseException as error:
                entry.state = UNAVAILABLE if entry.model is None else READY
                entry.reason = f"the last load failed: {one_line(error)}"
                entry.failed_loads += 1
                raise
            finally:
                self._group.own.opening -= 1
            entry.loads += 1
            old, entry.model, entry.state, entry.reason = entry.model, model, READY, ""
            log.info("model %s version %s is ready (%s)", entry.source.name, model.version, model.source.precision)
            if model.input.message_bytes > self.largest_message:
                log.warning(
                    "gRPC accepts messages of at most %d bytes until the server is restarted", self.largest_message
                )
            self._retire(old)

    async def unload(self, name: str) -> None:
        """Accept no more requests for a model; accepted ones are answered. Raises Refused for an unknown name."""
        entry = self.entry(name)
        async with entry.lock:
            old, entry.model, entry.state, entry.reason = entry.model, None, UNAVAILABLE, "unloaded"
            self._retire(old)

    def _retire(self, model: ServedModel | None) -> None:
        if model is not None:
            task = asyncio.get_running_loop().create_task(_drained(model))
            self._draining.add(task)  # keep a reference, because the event loop keeps only a weak one
            task.add_done_callback(self._draining.discard)

    async def close(self) -> None:
        """Close all models, each once it has answered its accepted requests."""
        for entry in self:
            self._retire(entry.model)
            entry.model, entry.state, entry.reason = None, UNAVAILABLE, "the server is stopping"
        await asyncio.gather(*self._draining)


async def _drained(model: ServedModel) -> None:
    while model.lane.running:
        await asyncio.sleep(0.01)
    model.close()


def _message_bytes(source: ModelSource, most: int) -> int:
    """Return the size of the largest gRPC request, of `most` images, for the bundle on disk."""
    try:
        channels, height, width = map(int, source.on_disk()["input_shape"])
    except (KeyError, TypeError, ValueError):
        return JSON_ENVELOPE  # a path that is not a bundle is not served
    return ImageInput("", (channels, height, width), most).message_bytes
