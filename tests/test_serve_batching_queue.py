"""What the batcher does not compute: what is late, given up, or more than its queue takes."""

import asyncio
import time

import pytest
from counting import FAR, Network, entered, images, in_loop, lane, outcome

from mpdsgr_deploy.serving.batcher import Batcher
from mpdsgr_deploy.serving.refusals import Refused, Why


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
