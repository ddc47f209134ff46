"""Batches of networks so quick that the event loop computes them itself."""

import asyncio
import time

import pytest
from counting import FAR, PATIENCE, Network, entered, images, in_loop, lane, outcome

from mpdsgr_deploy.serving import batcher as batcher_module
from mpdsgr_deploy.serving.batcher import Batcher, ModelLane
from mpdsgr_deploy.serving.refusals import Refused


async def at_rest(batcher: Batcher) -> None:
    """Until the thread waits for requests again, after it has handed over a batch."""
    async with asyncio.timeout(PATIENCE):
        while batcher._busy:
            await asyncio.sleep(0.001)


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
