"""What is computed together, for whom, and what is not computed at all."""

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from asgi import Client, started
from served import BUNDLE, INFER, Served, http, request
from served import images as served_images
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.serving import batcher as batcher_module
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.batcher import Batcher, Images, Lane, Outputs
from mpdsgr_deploy.serving.errors import Refused, Why
from mpdsgr_deploy.serving.grpc import Grpc
from mpdsgr_deploy.serving.settings import Settings
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


def lane(network: Network, most: int = 8, room: int = 1000) -> Lane:
    return Lane(network, Statistics(), most, room)


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

    async def ask(batcher: Batcher, to: Lane, numbers: list[float], rates: bool) -> None:
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
        assert refused.value.retry_after
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


class TestServer:
    """The whole server, with a network that stands still where a test wants it to."""

    @staticmethod
    def held(server: Server) -> Network:
        """Computes for BUNDLE's model as long as nothing is asked of the numbers."""
        network = Network()
        lane = server.repository.model("bundle").lane
        lane.compute = lambda x, rates: Outputs(np.repeat(network(x, rates).logits[:, :1], 10, axis=1))
        network.hold()
        return network

    def test_a_client_that_leaves_the_queue_is_not_computed(self) -> None:
        async def test() -> None:
            async with started(BUNDLE) as server, asyncio.timeout(PATIENCE):
                network = self.held(server)
                stays, leaves = Client(server), Client(server)
                first = asyncio.ensure_future(stays.post(INFER, request(pictures(1))))
                await entered(network)
                second = asyncio.ensure_future(leaves.post(INFER, request(pictures(1))))
                third = asyncio.ensure_future(stays.post(INFER, request(pictures(2))))
                lane = server.repository.model("bundle").lane
                while lane.images < 3:
                    await asyncio.sleep(0)
                leaves.leave()
                assert (await second).status == 499
                network.go()
                assert (await first).status == (await third).status == 200
                assert [len(batch) for batch in network.batches] == [1, 2]
                assert lane.statistics.dropped == {"cancelled": 1}
                assert lane.statistics.codes["http", "499"] == 1
                assert lane.running == server.memory.used == server.requests == 0

        asyncio.run(test())

    def test_a_request_whose_timeout_passes_in_the_queue_is_not_computed(self) -> None:
        async def test() -> None:
            async with started(BUNDLE) as server, asyncio.timeout(PATIENCE):
                network = self.held(server)
                client = Client(server)
                first = asyncio.ensure_future(client.post(INFER, request(pictures(1))))
                await entered(network)
                late = await client.post(INFER, request(pictures(1), parameters={"timeout": 20_000}))
                assert late.status == 504  # at its time, not only when the network is free again
                network.go()
                assert (await first).status == 200
                assert (await client.post(INFER, request(pictures(2)))).status == 200
                assert [len(batch) for batch in network.batches] == [1, 2]
                assert server.repository.model("bundle").statistics.dropped == {"deadline": 1}

        asyncio.run(test())

    def test_the_servers_own_limit_is_a_deadline_too(self) -> None:
        async def test() -> None:
            settings = Settings.model_validate({"limits": {"request_seconds": 0.02}})
            async with started(BUNDLE, settings=settings) as server, asyncio.timeout(PATIENCE):
                network = self.held(server)
                client = Client(server)
                first = asyncio.ensure_future(client.post(INFER, request(pictures(1))))
                await entered(network)
                late = asyncio.ensure_future(client.post(INFER, request(pictures(1))))
                lane = server.repository.model("bundle").lane
                while not lane.jobs:
                    await asyncio.sleep(0)
                job = lane.jobs[0]
                while time.monotonic() <= job.deadline:
                    await asyncio.sleep(0.001)
                network.go()
                assert (await first).status == 200
                assert (await late).status == 504
                assert [len(batch) for batch in network.batches] == [1]

        asyncio.run(test())

    def test_a_full_queue_is_503_and_says_when_to_come_back(self) -> None:
        async def test() -> None:
            settings = Settings.model_validate({"limits": {"queue": 2}})
            async with started(BUNDLE, settings=settings) as server, asyncio.timeout(PATIENCE):
                network = self.held(server)
                client = Client(server)
                tasks = [asyncio.ensure_future(client.post(INFER, request(pictures(1))))]
                await entered(network)
                tasks += [asyncio.ensure_future(client.post(INFER, request(pictures(1)))) for _ in range(5)]
                done, waiting = await asyncio.wait(tasks, return_when=asyncio.ALL_COMPLETED, timeout=0.2)
                assert [task.result().status for task in done] == [503, 503, 503]
                assert {task.result().headers["retry-after"] for task in done} == {"1"}
                network.go()
                assert {(await task).status for task in waiting} == {200}
                assert server.repository.model("bundle").statistics.dropped == {"queue_full": 3}

        asyncio.run(test())

    def test_a_call_that_is_cancelled_or_late_is_not_computed(self) -> None:
        async def test() -> None:
            async with started(BUNDLE) as server, asyncio.timeout(PATIENCE):
                network = self.held(server)
                listening = await Grpc.start(server, "127.0.0.1", 0, None)
                async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
                    ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
                    first = ask(call(1))
                    await entered(network)
                    cancelled, late = ask(call(1)), ask(call(1), timeout=0.3)
                    lane = server.repository.model("bundle").lane
                    while lane.images < 2:
                        await asyncio.sleep(0.001)
                    cancelled.cancel()
                    assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    while sum(job.future.cancelled() for job in lane.jobs) < 2:
                        await asyncio.sleep(0.001)
                    network.go()
                    await first
                    await ask(call(3))
                    assert [len(batch) for batch in network.batches] == [1, 3]
                    assert lane.statistics.dropped == {"cancelled": 2}
                await listening.stop(1)

        asyncio.run(test())

    def test_a_backend_that_breaks_is_500_for_its_requests_and_the_server_goes_on(self) -> None:
        async def test() -> None:
            async with started(BUNDLE) as server, asyncio.timeout(PATIENCE):
                network = self.held(server)
                network.go()
                client = Client(server)
                network.fails = lambda batch: len(batch) == 2
                for count, status in ((1, 200), (2, 500), (1, 200)):
                    answer = await client.post(INFER, request(pictures(count)))
                    assert answer.status == status
                    assert b"broke" not in answer.body, "what a backend says is for the log"

        asyncio.run(test())


def pictures(count: int) -> Images:
    return served_images(count)


def call(count: int) -> Any:
    x = pictures(count)
    message = pb.ModelInferRequest(model_name="bundle")
    message.inputs.add(name="images", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    return message


def test_a_flooded_server_fills_batches_and_gives_each_client_its_own_answer() -> None:
    with Served(limits={"batch": 8}) as served:
        x = served_images(48)
        alone = [served.post(INFER, request(x[i : i + 1])).output() for i in range(3)]
        expected = np.concatenate([served.post(INFER, request(x[i : i + 8])).output() for i in range(0, 48, 8)])
        np.testing.assert_allclose(np.concatenate(alone), expected[:3], atol=1e-5)
        before = served.metrics()
        # the first request for firing rates opens a second network, which gives the others time to queue
        outputs = [{"name": "logits"}, {"name": "firing_rate"}]
        served.signal(signal.SIGSTOP)  # all requests are there when it looks
        connections = [served.connect(60) for _ in range(48)]
        try:
            for i, connection in enumerate(connections):
                connection.send(http("POST", INFER, request(x[i : i + 1], outputs=outputs)))
            served.signal(signal.SIGCONT)
            found = np.concatenate([connection.reply().output() for connection in connections])
        finally:
            served.signal(signal.SIGCONT)
            for connection in connections:
                connection.close()
        np.testing.assert_allclose(found, expected, atol=1e-4)
        after = served.metrics()

        def more(name: str, **labels: str) -> float:
            inner = ",".join(f'{k}="{v}"' for k, v in sorted({"model": "bundle", "version": "1", **labels}.items()))
            return after[f"mpdsgr_{name}{{{inner}}}"] - before[f"mpdsgr_{name}{{{inner}}}"]

        assert more("images_total") == more("batch_images_sum") == 48
        assert more("batch_images_bucket", le="8.0") == more("batch_images_count"), "a batch above the limit"
        assert more("batch_images_count") < 24


class TestQuickNetworks:
    """What takes less than two changes of thread is computed by the event loop, once it is known to."""

    @pytest.fixture(autouse=True)
    def _every_batch_is_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batcher_module, "QUICK", PATIENCE)

    @staticmethod
    async def trusted(batcher: Batcher, network: Network) -> Lane:
        """A lane whose batches have been quick so often that the next is the loop's."""
        found = lane(network, most=4)
        for number in range(batcher_module.STREAK):
            await batcher.submit(found, images(number), FAR)
        assert set(network.threads) == {"inference"}
        await asyncio.sleep(0.05)  # until the thread waits again
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
