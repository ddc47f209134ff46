"""A server of the Open Inference Protocol as a Predictor, well behaved and otherwise."""

import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oip_server import Handler, OipServer
from over_url import FAST, INPUTS, SHAPE, linear, network

from mpdsgr_deploy.bundle import NoiseInput
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import NoiseSource, remote
from mpdsgr_deploy.runtime.remote import RemoteModel

X = np.random.default_rng(0).random((23, *SHAPE), np.float32)


def ask(server: OipServer, x: np.ndarray = X, **options: Any) -> np.ndarray:
    with RemoteModel(server.url, SHAPE, 10, **{"rate": FAST, **options}) as model:
        return model(x)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_logits_are_those_of_the_predictor_bit_for_bit(binary: bool, network: Predictor) -> None:
    with OipServer(network, INPUTS, binary=binary) as server:
        found = ask(server)
    assert found.dtype == np.float32
    assert np.array_equal(found, network(X))
    found += 1  # nobody else's memory


def test_a_server_without_metadata_of_its_own_is_asked_in_json() -> None:
    """Behind a proxy that shows the model alone."""
    with OipServer(linear, INPUTS, binary=False) as server:
        server.extensions = 7  # type: ignore[assignment] - nonsense
        assert np.array_equal(ask(server), linear(X))


def test_noise_that_the_network_takes_comes_from_the_bundles_seed() -> None:
    noise = NoiseSource([NoiseInput(name="a-noise", kind="normal", shape=(3, 4))], seed=5)

    def served(a_noise: np.ndarray, images: np.ndarray) -> np.ndarray:
        return linear(images) + a_noise[:, 0, :1]

    with OipServer(served, {"a-noise": (3, 4), "images": SHAPE}) as server:
        assert np.array_equal(ask(server, noise=noise), linear(X) + noise(X)["a-noise"][:, 0, :1])
        with pytest.raises(InputError, match="does not describe a model of images"):
            ask(server)
    with OipServer(served, {"a-noise": (3, 5), "images": SHAPE}) as server, pytest.raises(InputError, match="noise"):
        ask(server, noise=noise)
    with OipServer(linear, INPUTS) as server:  # which draws what it needs itself
        assert np.array_equal(ask(server, noise=noise), linear(X))


def test_the_rate_bounds_what_reaches_the_server() -> None:
    def drops_some(handler: Handler, number: int) -> bool:
        handler.close_connection = number % 3 == 1  # without an answer: asked once more
        return handler.close_connection

    with OipServer(linear, INPUTS, meddle=drops_some) as server, RemoteModel(server.url, SHAPE, 10, rate=50) as model:
        for _ in range(10):
            model(X)
    gaps = np.diff(server.times)
    assert len(gaps) == 14  # ten answers, and five that never came
    assert gaps.sum() >= 13.9 / 50  # a thread may note one request late, and the next in time
    assert np.sort(gaps)[3] >= 0.8 / 50


def test_a_batch_that_is_too_large_is_halved_until_it_fits() -> None:
    with OipServer(linear, INPUTS, most=6) as server, RemoteModel(server.url, SHAPE, 10, rate=FAST) as model:
        assert np.array_equal(model(X), linear(X))
        assert len(server.times) == 2 + 5  # 23 and 11 refused, then 5, 5, 5, 5, 3
        model(X)
        assert len(server.times) == 7 + 5  # what fits is remembered


def busy(times: int, **headers: str) -> Callable[[Handler, int], bool]:
    def meddle(handler: Handler, number: int) -> bool:
        if number < times:
            handler.answer(503, {"error": "too busy"}, **headers)
        return number < times

    return meddle


def test_a_busy_server_is_asked_again_after_the_time_it_names() -> None:
    with OipServer(linear, INPUTS, meddle=busy(2, Retry_After="0.15")) as server:
        assert np.array_equal(ask(server), linear(X))
    assert len(server.times) == 3
    assert np.diff(server.times).min() > 0.14


def test_a_server_that_stays_busy_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with OipServer(linear, INPUTS, meddle=busy(99, Retry_After="0")) as server:
        with pytest.raises(InputError, match=r"answers 503: .*too busy"):
            ask(server)
        assert len(server.times) == remote.ATTEMPTS
    slept: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: 0.0))
    with OipServer(linear, INPUTS, meddle=busy(99)) as server, pytest.raises(InputError):
        ask(server, rate=np.inf)
    assert slept == [1, 2, 4, 8]  # without a hint, twice as long each time


def test_a_connection_that_the_server_closed_is_opened_again() -> None:
    def closes(handler: Handler, number: int) -> None:
        handler.close_connection = True  # after the answer, without saying so

    with OipServer(linear, INPUTS, meddle=closes) as server, RemoteModel(server.url, SHAPE, 10, rate=FAST) as model:
        for _ in range(3):
            assert np.array_equal(model(X), linear(X))
            time.sleep(0.01)


def test_chunked_answers_are_understood() -> None:
    def chunks(handler: Handler, number: int) -> bool:
        handler.logits(linear(X), binary=True, chunked=True)
        return True

    with OipServer(linear, INPUTS, meddle=chunks) as server:
        assert np.array_equal(ask(server), linear(X))


def instead(logits: np.ndarray = X[:, 0, 0], *, binary: bool = True, **changed: Any) -> Callable[[Handler, int], bool]:
    def meddle(handler: Handler, number: int) -> bool:
        handler.logits(logits, binary=binary, **changed)
        return True

    return meddle


def says(status: int, content: Any, **headers: str) -> Callable[[Handler, int], bool]:
    def meddle(handler: Handler, number: int) -> bool:
        handler.answer(status, content, **headers)
        return True

    return meddle


GOOD = linear(X)
BAD = np.where(np.arange(10) == 3, np.nan, GOOD).astype(np.float32)


@pytest.mark.parametrize(
    ("meddle", "expected"),
    [
        (instead(GOOD[:, :9]), "shape"),
        (instead(GOOD[:22]), "shape"),
        (instead(GOOD.T.copy()), "shape"),
        (instead(GOOD[:22], shape=[23, 10]), "does not answer with logits"),
        (instead(GOOD, datatype="INT32"), "INT32"),
        (instead(GOOD, name="other"), "does not answer with logits"),
        (instead(GOOD, parameters={"binary_data_size": "many"}), "does not answer with logits"),
        (instead(BAD), "not finite"),
        (instead(BAD, binary=False), "not finite"),
        (instead(GOOD, binary=False, data=[None] * 230), "not finite"),
        (instead(GOOD, binary=False, data=[1e300] * 230), "not finite"),
        (instead(GOOD, binary=False, data=["one"] * 230), "does not answer with logits"),
        (says(200, {"outputs": []}), "does not answer with logits"),
        (says(200, {"error": "out of memory"}), "does not answer with logits"),
        (says(200, {}, Inference_Header_Content_Length="x"), "does not answer with logits"),
        (says(302, {}, Location="http://elsewhere/v2/models/net/infer"), "redirects to http://elsewhere"),
        (says(401, {"error": "who are you?"}), "answers 401: .*who are you"),
        (says(400, {"error": "no\nsuch\ninput"}), "answers 400: .*no"),
        (says(500, {"error": "out of memory"}), "answers 500: .*out of memory"),
    ],
)
def test_anything_but_finite_logits_is_one_line(meddle: Callable[[Handler, int], bool], expected: str) -> None:
    with OipServer(linear, INPUTS, meddle=meddle) as server, pytest.raises(InputError, match=expected) as error:
        ask(server)
    assert "\n" not in str(error.value)
    assert server.url in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "host/v2/models/net",
        "ftp://host/v2/models/net",
        "http://host:port/v2/models/net",
        "http://host:99999/v2/models/net",
        "http://[::1/v2/models/net",
        "http:///v2/models/net",
        "http://host/v2/models/",
        "http://host/v2/models/net/infer",
        "http://host/v2/models/net?version=1",
        "http://me:secret@host/v2/models/net",
    ],
)
def test_a_url_that_names_no_model(url: str) -> None:
    with pytest.raises(InputError, match="names no model; write http://HOST:PORT/v2/models/NAME"):
        RemoteModel(url, SHAPE, 10)


def test_servers_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with OipServer(linear, INPUTS) as server:
        with pytest.raises(InputError, match="answers 404"):
            RemoteModel(f"{server.url}s", SHAPE, 10)
        monkeypatch.setattr(remote, "TIMEOUT", 1.0)  # seconds, in which a busy machine answers what comes before
        over = threading.Event()
        server.meddle = lambda handler, number: over.wait(120) and None
        with pytest.raises(InputError, match=r"does not answer within 1 s"):
            ask(server)
        over.set()
        assert len(server.times) == 1  # that is not asked again
        with pytest.raises(InputError, match="rate"):
            ask(server, rate=0.0)
    with pytest.raises(InputError, match=f"cannot reach {server.url}: .*refused; is the server running"):
        ask(server)


def test_the_server_of_these_tests_follows_the_protocol() -> None:
    """Its binary answer, byte by byte as the extension describes it."""
    from http.client import HTTPConnection

    with OipServer(linear, INPUTS) as server:
        connection = HTTPConnection("127.0.0.1", server.port)
        data = X[:2].tobytes()
        tensor = {"name": "images", "shape": [2, 1, 8, 8], "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": len(data)}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        connection.request("POST", "/v2/models/net/infer", head + data, headers)
        response = connection.getresponse()
        length = int(response.headers["Inference-Header-Content-Length"])
        body = response.read()
        connection.close()
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 80}
    assert body[length:] == linear(X[:2]).astype("<f4").tobytes()
