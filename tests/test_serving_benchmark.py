"""The benchmark and the soak of the server: their pages, a short run of each, and what they must not overlook."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oip_server import Handler, OipServer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import harness
import serving
import serving_peer
import soak
import soak_hostile
import soak_traffic

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.runtime.remote import ModelUrl
from mpdsgr_deploy.serving.load.connection import Connection, Endpoint
from mpdsgr_deploy.serving.load.target_model import describe


@pytest.mark.parametrize("benchmark", [serving, serving_peer, soak], ids=lambda module: module.__name__)
def test_the_page_quotes_the_file(benchmark: Any) -> None:
    name = benchmark.__name__
    file, text = harness.page(name, benchmark.render(harness.load(name)))
    assert file.read_text() == text


def test_a_small_benchmark_measures_everything(bundle: Bundle) -> None:
    (sample,) = serving.measure(bundle, bundle, 1, 0.3)
    assert sample["server"]["1"]["batch"] == 1
    assert 1 < sample["server"]["32"]["batch"] <= 32
    assert 0 < serving.beyond(sample, "1") < sample["server"]["1"]["cpu_ms"]
    assert sample["memory"] > sample["holding"]["memory"] > 0
    assert min(sample["images_per_second"].values()) > 0
    lines = serving.render({**harness.load("serving"), "rounds": [sample, sample]}).splitlines()
    assert len([line for line in lines if "| at " in line]) == 6  # figures that have a goal


def test_the_models_own_time_is_that_of_the_batches_the_server_formed() -> None:
    model = {str(n): 1.0 + n for n in serving.BATCHES}
    sample = {"server": {"8": {"cpu_ms": 2.0, "batch": 3.0}}, "model_cpu_ms": model}
    assert serving.beyond(sample, "8") == pytest.approx(2.0 - 4.0 / 3.0)  # 3 lies between 2 and 4


def test_a_short_soak_finds_nothing_wrong(bundle: Bundle) -> None:
    result = soak.run(bundle, 2.5, 10**6)
    assert result["wrong"] == {}, result["examples"]
    kinds = {kind for kind in result["requests"] if not kind.startswith("hostile: ")}
    rare = {"grpc in a burst", "reload", "late", "left", "http margin", "bad grpc"}  # a busy machine may get to none
    every = {*soak_traffic.MIX, "grpc", "bad grpc", "grpc in a burst", "probe", "reload", "while it stops"}
    assert every - rare <= kinds <= every
    assert kinds < set(result["requests"])
    assert result["largest_difference"] <= soak_traffic.TOLERANCE
    assert (result["in_flight_bytes"], result["exit_code"], result["logged_errors"]) == (0, 0, [])
    assert "| wrong answers | 0;" in soak.render(result)


def test_a_soak_notices_wrong_answers_5xx_and_bad_requests_that_are_accepted() -> None:
    behaviours = [
        lambda handler: handler.logits(np.full((1, 10), 1.001, np.float32), binary=True),
        lambda handler: handler.logits(np.full((1, 10), np.nan, np.float32), binary=True),
        lambda handler: handler.answer(503, {"error": "full"}),
        lambda handler: handler.answer(400, {"error": "no"}),
        lambda handler: setattr(handler, "close_connection", True),
        lambda handler: handler.logits(np.ones((1, 10), np.float32), binary=True),
    ]
    counts = soak_traffic.Counts()

    def meddle(handler: Handler, number: int) -> bool:
        behaviours[number % len(behaviours)](handler)
        return True

    async def traffic(server: OipServer) -> None:
        model = await describe(server.url, Endpoint(ModelUrl.split(server.url)))
        message = model.requests(1, None, 0)[0]
        good = soak_traffic.asking("good", model, message, 1, np.ones((1, 10), np.float32), counts)
        bad = soak_traffic.refused("bad", message, counts)
        connection = Connection(model.endpoint)
        for ask in [good, bad]:
            for _ in behaviours:
                await ask(connection)
        connection.close()

    with OipServer(np.ones_like, {"images": (1, 8, 8)}, meddle=meddle) as server:
        asyncio.run(traffic(server))
    good = {"wrong answer": 2, "5xx": 1, "refused": 1, "no answer": 1}
    bad = {"accepted": 3, "5xx": 1, "no answer": 1}
    assert counts.wrong == {kind: good.get(kind, 0) + bad.get(kind, 0) for kind in {*good, *bad}}
    assert len(counts.examples) == 10


def test_memory_is_told_by_tenths_of_the_time() -> None:
    samples = [[0, 0, float(value)] for value in range(105)]
    tenths = soak.by_tenths(samples, 2)
    assert (len(tenths), tenths[0], tenths[-1]) == (10, 4.5, 99.0)  # of values to 9, and from 94 on
    assert soak.by_tenths([[0, 0, 7.0]], 2) == [7.0]


def test_a_cancelled_probe_closes_its_connection() -> None:
    async def cancel_during_probe() -> None:
        asked, closed = asyncio.Event(), asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            asked.set()
            await reader.read()
            closed.set()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        attacks = soak_hostile.HttpAttacks(host, port, b"\r\n\r\n", soak_traffic.Counts(), time.monotonic)
        probe = asyncio.create_task(attacks.probe())
        await asked.wait()
        probe.cancel()
        await asyncio.wait({probe})
        async with asyncio.timeout(10):
            await closed.wait()
        server.close()

    asyncio.run(cancel_during_probe())
