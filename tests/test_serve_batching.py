"""What the batcher computes together, in what order, and whose rows are whose."""

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from counting import FAR, PATIENCE, Network, entered, images, in_loop, lane, outcome

from mpdsgr_deploy.serving import batcher as batcher_module
from mpdsgr_deploy.serving.batcher import Batcher, ModelLane, Outputs
from mpdsgr_deploy.serving.refusals import Refused, Why
from mpdsgr_deploy.serving.statistics import Statistics


def test_an_idle_batcher_computes_a_request_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    class Condition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(batcher_module, "threading", SimpleNamespace(Condition=Condition, Thread=threading.Thread))
    monkeypatch.setattr(batcher_module.time, "sleep", lambda seconds: pytest.fail("it sleeps"))
    network = Network()

    async def test(batcher: Batcher) -> None:
        alone = lane(network)
        for number in range(5):
            await batcher.submit(alone, images(number), FAR)

    in_loop(test)
    assert network.batches == [[0], [1], [2], [3], [4]]
    assert set(waits) <= {None}, "it waits for more requests to come"


def test_what_came_during_a_batch_is_the_next_one_up_to_the_limit_and_in_order() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        busy = lane(network, most=4)
        network.hold()
        futures = [batcher.submit(busy, images(0), FAR)]
        await entered(network)
        futures += [batcher.submit(busy, images(number), FAR) for number in range(1, 10)]
        assert busy.images == 9
        assert busy.running == 10
        network.go()
        await asyncio.gather(*futures)
        assert busy.images == busy.running == 0
        assert busy.statistics.images == 10
        assert busy.statistics.batch.count == 4

    in_loop(test)
    assert network.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_requests_stay_whole_and_no_later_one_overtakes() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        busy = lane(network, most=4)
        network.hold()
        futures = [batcher.submit(busy, images(0), FAR)]
        await entered(network)
        for numbers in ([1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11]):
            futures.append(batcher.submit(busy, images(*numbers), FAR))
        network.go()
        await asyncio.gather(*futures)

    in_loop(test)
    assert network.batches == [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11]]


def test_requests_with_firing_rates_are_not_computed_with_those_without() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        busy = lane(network)
        network.hold()
        futures = [batcher.submit(busy, images(0), FAR)]
        await entered(network)
        for number, rates in ((1, False), (2, True), (3, True), (4, False)):
            futures.append(batcher.submit(busy, images(number), FAR, rates=rates))
        network.go()
        found = await asyncio.gather(*futures)
        assert [outputs.rates is not None for outputs in found] == [False, False, True, True, False]
        assert found[3].rates is not None
        assert found[3].rates.tolist() == [[1.5]]

    in_loop(test)
    assert [(numbers, rates) for _, numbers, rates in network.log] == [
        ([0], False),
        ([1], False),
        ([2, 3], True),
        ([4], False),
    ]


def test_each_request_gets_its_own_rows() -> None:
    rng = np.random.default_rng(0)
    networks = [Network("a"), Network("b")]

    async def ask(batcher: Batcher, to: ModelLane, numbers: list[float], rates: bool) -> None:
        await asyncio.sleep(0)
        found = await batcher.submit(to, images(*numbers), FAR, rates=rates)
        assert found.logits.tolist() == [[number, 2 * number] for number in numbers]
        assert (found.rates is not None) == rates
        assert found.rates is None or found.rates.tolist() == [[number / 2] for number in numbers]

    async def test(batcher: Batcher) -> None:
        lanes = [lane(networks[0], most=7, room=10_000), lane(networks[1], most=20, room=10_000)]
        for _ in range(20):
            tasks = []
            for _ in range(60):
                to = int(rng.integers(2))
                numbers = rng.integers(0, 10_000, rng.integers(1, lanes[to].most + 1)).astype(float).tolist()
                tasks.append(ask(batcher, lanes[to], numbers, bool(rng.random() < 0.3)))
            await asyncio.gather(*tasks)
        for each in lanes:
            assert each.statistics.images == each.statistics.batch.sum

    in_loop(test)
    for network, most in zip(networks, (7, 20), strict=True):
        sizes = list(map(len, network.batches))
        assert max(sizes) <= most
        assert len(sizes) < 600, "hardly anything was computed together"


def test_a_flooded_model_leaves_every_second_turn_to_another() -> None:
    log: list[tuple[str, list[float], bool]] = []
    flooded, other = Network("flooded", log), Network("other", log)

    async def test(batcher: Batcher) -> None:
        one, two = lane(flooded, most=2), lane(other, most=2)
        flooded.hold()
        futures = [batcher.submit(one, images(0, 0), FAR) for _ in range(12)]
        await entered(flooded)
        futures += [batcher.submit(two, images(number, number), FAR) for number in range(3)]
        flooded.go()
        await asyncio.gather(*futures)

    in_loop(test)
    names = [name for name, _, _ in log]
    assert names[:8] == ["flooded", "flooded", "other", "flooded", "other", "flooded", "other", "flooded"]
    assert names.count("flooded") == 12


def test_a_computation_that_fails_costs_its_own_requests_only() -> None:
    network = Network()
    network.fails = lambda batch: bool((batch == 13).any())

    async def test(batcher: Batcher) -> None:
        busy = lane(network, most=2)
        network.hold()
        futures = [batcher.submit(busy, images(0), FAR)]
        await entered(network)
        futures += [batcher.submit(busy, images(number), FAR) for number in (1, 2, 13, 4, 5, 6)]
        network.go()
        found = [await outcome(future) for future in futures]
        assert [isinstance(one, Outputs) for one in found] == [True, True, True, False, False, True, True]
        assert str(found[3]) == "the backend broke"
        assert busy.statistics.images == 5  # what failed was not computed
        assert busy.running == 0

    in_loop(test)
    assert network.batches == [[0], [1, 2], [13, 4], [5, 6]]


def test_bad_images_are_refused_alone_and_teach_nothing() -> None:
    """The network looks at a batch's pixels as a whole, so that the event loop need not look at each request's."""
    network, refusal = Network(), Refused(Why.INVALID, "bad pixels")
    network.fails = lambda images: bool((images < 0).any())
    told = ModelLane(network, Statistics(), 8, 1000, lambda images: refusal if (images < 0).any() else None)

    async def test(batcher: Batcher) -> None:
        network.hold()
        futures = [batcher.submit(told, images(number), FAR) for number in (1, -2, 3, -4)]
        await entered(network)
        network.go()
        first, second, third, fourth = [await outcome(future) for future in futures]
        assert second is fourth is refusal
        assert isinstance(first, Outputs)
        assert isinstance(third, Outputs)
        assert [first.logits.tolist(), third.logits.tolist()] == [[[1, 2]], [[3, 6]]]
        assert told.statistics.images == 2
        streak = told.streak
        assert await outcome(batcher.submit(told, images(-1, -1), FAR)) is refusal
        assert (told.streak, told.statistics.images, told.running) == (streak, 2, 0)

    in_loop(test)


def test_times_and_sizes_are_counted() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        counted = lane(network)
        await batcher.submit(counted, images(1, 2, 3), FAR)
        await batcher.submit(counted, images(4), FAR)
        statistics = counted.statistics
        assert statistics.images == statistics.batch.sum == 4
        assert statistics.batch.count == statistics.inference.count == statistics.queue.count == 2
        assert abs(statistics.last_inference_ms / 1000 - time.time()) < PATIENCE

    in_loop(test)
