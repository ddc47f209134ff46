"""Batches, deadlines and turns of a whole server."""

import asyncio
import contextlib
import signal
import time

import grpc
import numpy as np
import pytest
from asgi import Client, started
from counting import PATIENCE, Network, entered
from served import BUNDLE, INFER, VERSION, Served, http, request
from served import images as served_images
from served_clients import asked
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.runtime.inference_protocol import encode_request
from mpdsgr_deploy.serving import served_model
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.batcher import Images, Outputs
from mpdsgr_deploy.serving.grpc import start_grpc
from mpdsgr_deploy.serving.settings import ServerSettings


def test_pixels_are_checked_whatever_the_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    careless = contextlib.nullcontext(lambda images: np.zeros((len(images), 10), np.float32))
    monkeypatch.setattr(served_model, "open_predictor", lambda *_: careless)

    async def test() -> None:
        async with started(BUNDLE) as server:
            bad = served_images(2)
            for value in (np.nan, np.inf, -0.5, 1.5):
                bad[1, 0, 3, 3] = value
                headers, body = encode_request({"images": bad}, "logits", binary=True)
                told = {name.replace("-", "_"): value for name, value in headers.items()}
                good, wrong = await asyncio.gather(
                    Client(server).post(INFER, request(served_images(1))), Client(server).post(INFER, body, **told)
                )
                assert (good.status, wrong.status) == (200, 400)
                assert b"in [0, 1]" in wrong.body

    asyncio.run(test())


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
                assert lane.running == server.memory.used == server.counts.requests == 0

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
            settings = ServerSettings.model_validate({"limits": {"request_seconds": 0.02}})
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
            settings = ServerSettings.model_validate({"limits": {"queue": 2}})
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
                listening = await start_grpc(server, "127.0.0.1", 0, None)
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
                    ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
                    first = ask(asked(1, "bundle"))
                    await entered(network)
                    cancelled, late = ask(asked(1, "bundle")), ask(asked(1, "bundle"), timeout=0.3)
                    lane = server.repository.model("bundle").lane
                    while lane.images < 2:
                        await asyncio.sleep(0.001)
                    cancelled.cancel()
                    assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    while sum(job.future.cancelled() for job in lane.jobs) < 2:
                        await asyncio.sleep(0.001)
                    network.go()
                    await first
                    await ask(asked(3, "bundle"))
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
            inner = ",".join(f'{k}="{v}"' for k, v in sorted({"model": "bundle", "version": VERSION, **labels}.items()))
            return after[f"mpdsgr_{name}{{{inner}}}"] - before[f"mpdsgr_{name}{{{inner}}}"]

        assert more("images_total") == more("batch_images_sum") == 48
        assert more("batch_images_bucket", le="8.0") == more("batch_images_count"), "a batch above the limit"
        assert more("batch_images_count") < 40  # how full they get is up to the machine; `test_serve_batching` says how
