"""A network that notes what it computes, and a batcher in an event loop, for tests."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np

from mpdsgr_deploy.serving.batcher import Batcher, Images, ModelLane, Outputs
from mpdsgr_deploy.serving.statistics import Statistics

FAR = 1e9  # a deadline that no test sees pass


PATIENCE = 30.0  # seconds until a test that waits gives up


class Network:
    """A computation that notes its batches: whose it is, the images' numbers, and whether with rates.

    An image holds one number; its logits are that number and its double, its rate the half. held: it stands still
    until `go`, at its first batch or at each until then.
    """

    def __init__(self, name: str = "net", log: list[tuple[str, list[float], bool]] | None = None) -> None:
        self.name, self.log = name, [] if log is None else log
        self.threads: list[str] = []  # that computed them
        self.entered, self._open = threading.Event(), threading.Event()
        self.fails: Callable[[Images], bool] = lambda images: False
        self._open.set()

    def hold(self) -> None:
        self._open.clear()
        self.entered.clear()

    def go(self) -> None:
        self._open.set()

    def __call__(self, images: Images, rates: bool) -> Outputs:
        self.log.append((self.name, images[:, 0, 0, 0].tolist(), rates))
        self.threads.append(threading.current_thread().name)
        self.entered.set()
        assert self._open.wait(PATIENCE)
        if self.fails(images):
            raise RuntimeError("the backend broke")
        column = images[:, :, 0, 0]
        return Outputs(np.concatenate([column, 2 * column], axis=1), column / 2 if rates else None)

    @property
    def batches(self) -> list[list[float]]:
        return [numbers for _, numbers, _ in self.log]


def images(*numbers: float) -> Images:
    return np.array(numbers, np.float32).reshape(-1, 1, 1, 1)


def lane(network: Network, most: int = 8, room: int = 1000) -> ModelLane:
    return ModelLane(network, Statistics(), most, room)


def in_loop(test: Callable[[Batcher], Coroutine[Any, Any, None]]) -> None:
    """Run a test with a batcher in an event loop."""

    async def run() -> None:
        batcher = Batcher()
        try:
            async with asyncio.timeout(PATIENCE):
                await test(batcher)
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())


async def entered(network: Network) -> None:
    assert await asyncio.to_thread(network.entered.wait, PATIENCE)


async def outcome(future: Awaitable[Outputs]) -> Outputs | Exception:
    try:
        return await future
    except Exception as error:
        return error
