"""The load of mpdsgr bench on real sockets: what it asks, what it counts, and servers that misbehave."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
from loading import INPUTS, linear, load
from oip_server import Handler, OipServer

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.remote import ModelUrl
from mpdsgr_deploy.serving.load import Load, connection, loops


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_a_closed_loop_asks_as_often_as_it_may_and_every_answer_is_good(binary: bool, datatype: str) -> None:
    seen: list[np.ndarray] = []

    def network(*tensors: np.ndarray) -> np.ndarray:
        seen.append(tensors[0])
        assert [tensor.shape[1:] for tensor in tensors] == [(1, 8, 8), (3,)]
        return linear(*tensors)

    with OipServer(network, {**INPUTS, "noise": (3,)}, binary=binary, datatype=datatype) as server:
        outcome = load(server, batch=3)
    assert len(server.times) == len(seen) == 50 + 5 + 1
    assert {images.shape for images in seen} == {(3, 1, 8, 8)}
    assert {images.dtype for images in seen} == {np.dtype(np.uint8 if datatype == "UINT8" else np.float32)}
    assert len({images.tobytes() for images in seen}) == 16  # not one request again and again
    assert min(map(np.min, seen)) >= 0
    assert max(map(np.max, seen)) <= (255 if datatype == "UINT8" else 1)
    assert (outcome.tally.requests, len(outcome.tally.latencies), outcome.tally.errors) == (50, 50, {})
    assert outcome.images_per_second == pytest.approx(150 / outcome.tally.busy)


def test_given_images_are_sent_in_turn_as_the_type_the_model_takes() -> None:
    pixels = np.arange(5 * 64, dtype=np.uint8).reshape(5, 1, 8, 8)
    sent: dict[str, list[np.ndarray]] = {"FP32": [], "UINT8": []}
    for datatype, seen in sent.items():

        def network(images: np.ndarray, seen: list[np.ndarray] = seen) -> np.ndarray:
            seen.append(images)
            return linear(images)

        with OipServer(network, INPUTS, datatype=datatype) as server:
            load(server, Load(20.0, 10, concurrency=1), images=pixels, batch=2)
            with pytest.raises(InputError, match=r"images are uint8 \[5, 1, 4, 16\], but input 'images' is .*1, 8, 8"):
                load(server, images=pixels.reshape(5, 1, 4, 16))
    asked = np.concatenate(sent["UINT8"][-10:])  # the first was tried and warmed up with before
    assert np.array_equal(asked, np.tile(pixels, (4, 1, 1, 1)))
    assert np.array_equal(np.concatenate(sent["FP32"][-10:]), asked / np.float32(255))


def test_the_same_seed_asks_the_same_at_the_same_times() -> None:
    seen: list[bytes] = []

    def network(images: np.ndarray) -> np.ndarray:
        seen.append(images.tobytes())
        return linear(images)

    wanted = Load(20.0, 9, rate=30)
    for seed in (3, 3, 4):
        started = time.monotonic()
        with OipServer(network, INPUTS) as server:
            load(server, wanted, seed=seed)
        asked = np.sort(server.times[1:]) - started  # one came before, to try
        assert (asked >= list(loops.arrivals(wanted, seed))).all()
    # sorted: on a busy machine two requests that are under way together may overtake each other
    assert sorted(seen[:10]) == sorted(seen[10:20]) != sorted(seen[20:])
    assert [*loops.arrivals(wanted, 3)] == [*loops.arrivals(wanted, 3)] != [*loops.arrivals(wanted, 4)]


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.diff([0.0, *loops.arrivals(Load(1000.0, 20_000, rate=40), seed=0)])
    assert len(gaps) == 20_000
    assert scipy.stats.kstest(gaps, scipy.stats.expon(scale=1 / 40).cdf).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03
    assert max(loops.arrivals(Load(3.0, 20_000, rate=40), seed=0)) <= 3.0


def stalls(number: int, seconds: float) -> Callable[[Handler, int], None]:
    """A server that does nothing at all for a while, once."""
    lock = threading.Lock()

    def meddle(handler: Handler, which: int) -> None:
        with lock:
            if which == number:
                time.sleep(seconds)

    return meddle


def test_an_open_loop_shows_a_stall_that_a_closed_one_hides() -> None:
    with OipServer(linear, INPUTS, meddle=stalls(100, 0.3)) as server:
        closed = load(server, Load(20.0, 300, concurrency=1))
    with OipServer(linear, INPUTS, meddle=stalls(100, 0.3)) as server:
        open_ = load(server, Load(20.0, 300, rate=300))
    slow = [sum(seconds > 0.15 for seconds in outcome.tally.latencies) for outcome in (closed, open_)]
    assert slow[1] > 25  # about 45 were due
    assert slow[0] < slow[1] / 2  # everybody else never asked
    assert len(open_.tally.latencies) == 300
    assert open_.latency_ms["p99"] > 250
    assert open_.tally.busy > 0.8  # 300 at 300 a second


def test_errors_are_counted_by_status_and_are_no_latencies() -> None:
    def meddle(handler: Handler, number: int) -> bool:
        kind = number % 5 if number > 5 else 4  # good while it warms up
        if kind == 0:
            handler.answer(503, {"error": "full"}, Retry_After="1")
        elif kind == 1:
            handler.logits(np.zeros((2, 10), np.float32), binary=True)  # of one image too many
        elif kind == 2:
            handler.close_connection = True
        elif kind == 3:
            handler.answer(500, {"error": "broken"})
        return kind < 4

    with OipServer(linear, INPUTS, meddle=meddle) as server:
        outcome = load(server)
    assert outcome.tally.errors == {"503": 10, "wrong answer": 10, "connection": 10, "500": 10}
    assert (outcome.tally.requests, len(outcome.tally.latencies)) == (50, 10)
    assert outcome.row()[-2] == "10 x 500, 10 x 503, 10 x connection, 10 x wrong answer"


@pytest.mark.parametrize(
    "wrong",
    [{"shape": [1, 9]}, {"shape": [10]}, {"name": "other"}, {"parameters": {"binary_data_size": 36}}, {"shape": None}],
    ids=str,
)
def test_a_server_that_answers_something_else_is_told_at_once(wrong: dict[str, Any]) -> None:
    def meddle(handler: Handler, number: int) -> bool:
        handler.logits(np.zeros((1, 10), np.float32), binary=True, **wrong)
        return True

    with OipServer(linear, INPUTS, meddle=meddle) as server, pytest.raises(InputError, match="does not return"):
        load(server)


def test_an_answer_that_never_comes_ends_the_request_not_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LONGEST", 3.0)  # seconds, in which a busy machine gives all other answers
    over = threading.Event()

    def meddle(handler: Handler, number: int) -> None:
        if number == 20:
            over.wait(120)

    with OipServer(linear, INPUTS, meddle=meddle) as server:
        outcome = load(server)
        over.set()
    assert outcome.tally.errors == {"timeout": 1}
    assert len(outcome.tally.latencies) == 49


def test_a_refusal_that_comes_before_the_request_is_its_answer() -> None:
    """A server without room refuses a connection as it accepts it, perhaps before the client has sent anything."""

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbusy")
        writer.close()

    async def ask_late() -> connection.HttpAnswer:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = connection.Connection(connection.Endpoint(ModelUrl.split(f"http://127.0.0.1:{port}/v2/models/m")))
            wire = await client.open()
            while not wire.closed:
                await asyncio.sleep(0.001)
            answer = await wire.ask(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(connection.NoAnswer):
                await wire.ask(b"GET / HTTP/1.1\r\n\r\n")
            return answer

    answer = asyncio.run(asyncio.wait_for(ask_late(), 60))
    assert (answer.status, answer.body) == (503, b"busy")


def test_what_a_server_is_too_slow_for_is_said_to_be_unsent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "MOST_CONNECTIONS", 2)
    with OipServer(linear, INPUTS, meddle=lambda handler, number: time.sleep(0.05)) as server:
        outcome = load(server, Load(0.5, 1000, rate=200))
    unsent = outcome.tally.errors["unsent"]
    assert 30 < unsent < 120  # about 100 were due and 20 answered
    assert outcome.tally.requests == len(outcome.tally.latencies) < 30
    assert outcome.warnings == [
        f"200 per second: {unsent} requests were due but not sent, because the server was too far behind"
    ]


def test_seconds_bound_a_load() -> None:
    with OipServer(linear, INPUTS) as server:
        outcome = load(server, Load(0.3, 10**6, concurrency=2))
    assert 0 < outcome.tally.busy <= 0.3
    assert outcome.tally.requests < 10**6
