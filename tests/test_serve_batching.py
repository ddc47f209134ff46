"""What the batcher computes together, in what order, and what not at all."""

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from counting import FAR, PATIENCE, Network, entered, images, in_loop, lane, outcome

from mpdsgr_deploy.serving import batcher as batcher_module
from mpdsgr_deploy.serving.batcher import Batcher, ModelLane, Outputs
from mpdsgr_deploy.serving.errors import Refused, Why
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


async def at_rest(batcher: Batcher) -> None:
    """Until the thread waits for requests again, after it has handed over a batch."""
    async with asyncio.timeout(PATIENCE):
        while batcher._busy:
            await asyncio.sleep(0.001)


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


def test_who_left_and_what_is_too_late_is_not_computed() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        busy = lane(network)
        network.hold()
        first = batcher.submit(busy, images(0), FAR)
        await entered(network)
        left = batcher.submit(busy, images(1), FAR)
        late = batcher.submit(busy, images(2), time.monotonic())
        told = batcher.submit(busy, images(3), FAR)
        kept = batcher.submit(busy, images(4), FAR)
        left.cancel()
        told.set_exception(Refused(Why.LATE, "its own timer"))
        network.go()
        assert (await first).logits.tolist() == [[0, 0]]
        assert (await kept).logits.tolist() == [[4, 8]]
        refused = await outcome(late)
        assert isinstance(refused, Refused)
        assert refused.why is Why.LATE
        assert isinstance(await outcome(told), Refused)
        assert busy.statistics.dropped == {"cancelled": 1, "deadline": 2}
        assert busy.images == busy.running == 0

    in_loop(test)
    assert network.batches == [[0], [4]]


def test_only_dropped_requests_make_no_batch() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        idle = lane(network)
        assert isinstance(await outcome(batcher.submit(idle, images(1), time.monotonic() - 1)), Refused)
        await batcher.submit(idle, images(2), FAR)
        assert idle.statistics.batch.count == 1

    in_loop(test)
    assert network.batches == [[2]]


def test_who_leaves_while_it_is_computed_takes_nothing_from_the_others() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        busy = lane(network)
        network.hold()
        first = batcher.submit(busy, images(0), FAR)
        await entered(network)
        several = [batcher.submit(busy, images(number), FAR) for number in (1, 2, 3)]
        network.entered.clear()
        network.go()
        await first
        network.hold()
        again = batcher.submit(busy, images(4), FAR)
        await entered(network)
        again.cancel()
        network.go()
        found = await asyncio.gather(*several)
        assert [outputs.logits[0, 0] for outputs in found] == [1, 2, 3]
        assert (await batcher.submit(busy, images(5), FAR)).logits[0, 0] == 5

    in_loop(test)


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


def test_a_full_queue_refuses_and_takes_again_once_it_is_shorter() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        busy = lane(network, most=4, room=4)
        network.hold()
        first = batcher.submit(busy, images(0), FAR)
        await entered(network)
        waiting = batcher.submit(busy, images(1, 2, 3), FAR)
        with pytest.raises(Refused) as refused:
            batcher.submit(busy, images(4, 5), FAR)
        assert refused.value.why is Why.BUSY
        assert int(refused.value.headers["retry-after"]) > 0
        fits = batcher.submit(busy, images(6), FAR)
        assert busy.statistics.dropped == {"queue_full": 1}
        network.go()
        await asyncio.gather(first, waiting, fits)
        await batcher.submit(busy, images(4, 5), FAR)
        assert busy.running == 0

    in_loop(test)
    assert network.batches == [[0], [1, 2, 3, 6], [4, 5]]


def test_a_request_larger_than_the_queue_is_taken_by_an_empty_one() -> None:
    network = Network()

    async def test(batcher: Batcher) -> None:
        await batcher.submit(lane(network, most=8, room=2), images(1, 2, 3, 4), FAR)

    in_loop(test)
    assert network.batches == [[1, 2, 3, 4]]


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


class TestQuickNetworks:
    """What takes less than two changes of thread is computed by the event loop, once it is known to."""

    @pytest.fixture(autouse=True)
    def _every_batch_is_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batcher_module, "QUICK", PATIENCE)

    @staticmethod
    async def trusted(batcher: Batcher, network: Network) -> ModelLane:
        """A lane whose batches have been quick so often that the next is the loop's."""
        found = lane(network, most=4)
        for _ in range(batcher_module.STREAK):
            await batcher.submit(found, images(0, 1, 2, 3), FAR)
        assert set(network.threads) == {"inference"}
        await at_rest(batcher)
        network.log.clear()
        network.threads.clear()
        return found

    def test_the_loop_computes_together_what_it_has_read_in_one_go(self) -> None:
        network = Network()

        async def test(batcher: Batcher) -> None:
            quick = await self.trusted(batcher, network)
            futures = [batcher.submit(quick, images(number), FAR) for number in range(6)]
            found = await asyncio.gather(*futures)
            assert [float(outputs.logits[0, 0]) for outputs in found] == [0, 1, 2, 3, 4, 5]
            assert quick.running == quick.images == 0

        in_loop(test)
        assert network.batches == [[0, 1, 2, 3], [4, 5]]
        assert set(network.threads) == {"MainThread"}

    def test_one_slow_batch_gives_it_back_to_the_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = Network()

        async def test(batcher: Batcher) -> None:
            quick = await self.trusted(batcher, network)
            await batcher.submit(quick, images(1), FAR)
            monkeypatch.setattr(batcher_module, "QUICK", 0.0)
            await batcher.submit(quick, images(2), FAR)
            await batcher.submit(quick, images(3), FAR)

        in_loop(test)
        assert network.threads == ["MainThread", "MainThread", "inference"]

    def test_dropped_requests_teach_nothing(self) -> None:
        network = Network()

        async def test(batcher: Batcher) -> None:
            slow = lane(network)
            for number in range(3 * batcher_module.STREAK):
                assert isinstance(await outcome(batcher.submit(slow, images(number), time.monotonic() - 1)), Refused)
            await batcher.submit(slow, images(1), FAR)
            assert slow.streak <= 1

        in_loop(test)
        assert network.threads == ["inference"]

    def test_a_batch_much_larger_than_those_that_were_quick_is_the_threads(self) -> None:
        network = Network()

        async def test(batcher: Batcher) -> None:
            found = lane(network, most=64)
            for number in range(batcher_module.STREAK):
                await batcher.submit(found, images(number), FAR)
            await at_rest(batcher)
            network.threads.clear()
            for size in (2, 64, 3, 6):
                await batcher.submit(found, images(*range(size)), FAR)
                await at_rest(batcher)

        in_loop(test)
        assert network.threads == ["MainThread", "inference", "MainThread", "MainThread"]

    def test_firing_rates_may_open_a_network_first_and_stay_with_the_thread(self) -> None:
        network = Network()

        async def test(batcher: Batcher) -> None:
            quick = await self.trusted(batcher, network)
            futures = [batcher.submit(quick, images(n), FAR, rates=rates) for n, rates in ((1, True), (2, False))]
            await asyncio.gather(*futures)

        in_loop(test)
        assert network.batches == [[1], [2]]
        assert network.threads[0] == "inference"

    def test_while_the_thread_computes_requests_wait_for_it(self) -> None:
        network, slow = Network(), Network("slow")

        async def test(batcher: Batcher) -> None:
            quick = await self.trusted(batcher, network)
            slow.hold()
            futures = [batcher.submit(lane(slow), images(9), FAR)]
            await entered(slow)
            futures += [batcher.submit(quick, images(number), FAR) for number in (1, 2)]
            await asyncio.sleep(0.05)
            assert network.batches == []
            slow.go()
            await asyncio.gather(*futures)

        in_loop(test)
        assert network.batches == [[1, 2]]
        assert network.threads == ["inference"]

    def test_what_is_too_late_or_given_up_is_not_computed(self) -> None:
        network = Network()

        async def test(batcher: Batcher) -> None:
            quick = await self.trusted(batcher, network)
            late = batcher.submit(quick, images(1), time.monotonic() - 1)
            left = batcher.submit(quick, images(2), FAR)
            left.cancel()
            kept = batcher.submit(quick, images(3), FAR)
            assert isinstance(await outcome(late), Refused)
            await kept
            assert quick.statistics.dropped == {"deadline": 1, "cancelled": 1}

        in_loop(test)
        assert network.batches == [[3]]
