"""A server's life: loading, readiness, signals, the end under load, another version of a bundle, and what it tells."""

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from asgi import Client, started
from conftest import assert_input_error, mpdsgr, mpdsgr_here, perturbed, resealed
from numpy.typing import NDArray
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from served import BUNDLE, INFER, Served, eventually, http, images, request
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.serving.grpc import Grpc
from mpdsgr_deploy.serving.logs import log_json
from mpdsgr_deploy.serving.server import _bound

OTHER = "/v2/models/other"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Server processes started now wait, each time they read a golden batch, until this file is there."""
    go, hook = tmp_path / "go", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(f"""
import os, sys, time
def hold(event, arguments):
    while event == "open" and str(arguments[0]).endswith("golden.npz") and not os.path.exists({str(go)!r}):
        time.sleep(0.01)
sys.addaudithook(hold)
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")])))
    return go


def loading(*arguments: object, **options: Any) -> Served:
    """A server that listens and is not ready yet."""
    port = free_port()
    served = Served(*arguments, "--port", port, wait=False, **options)
    served.port = port
    if not eventually(lambda: answers(served), 30):
        served.stop(signal.SIGKILL)
        raise AssertionError(served.lines)
    return served


def answers(served: Served) -> bool:
    with suppress(OSError):
        return served.get("/v2/health/live").status == 200
    return False


def messages(served: Served) -> list[str]:
    return [line["message"] for line in served.lines]


def error_line(served: Served) -> str:
    """The one line that is not of the log, at its end."""
    plain = [line["message"] for line in served.lines if not line["level"]]
    assert len(plain) == 1, served.lines
    return plain[0]


class TestStart:
    def test_live_at_once_and_ready_when_all_models_are(self, gate: Path) -> None:
        with loading(BUNDLE, f"other={BUNDLE}@int8") as served:
            assert served.get("/v2/health/ready").status == 503
            for model in ("/v2/models/bundle", OTHER):
                early = served.post(f"{model}/infer", request(images()))
                assert early.status == 503, early
                assert early.headers["retry-after"]
            assert {entry["state"] for entry in served.get("/status").json()["models"]} == {"LOADING"}
            assert not served.get("/status").json()["server"]["ready"]
            gate.touch()
            served.wait()
            assert served.get("/v2/health/ready").status == 200
            assert served.post(INFER, request(images())).status == 200
            assert served.post(f"{OTHER}/infer", request(images())).status == 200

    def test_sigterm_while_it_loads_ends_it_before_the_next_model(self, gate: Path) -> None:
        with loading(BUNDLE, f"other={BUNDLE}") as served:
            served.signal(signal.SIGTERM)
            assert eventually(lambda: any("stopping" in message for message in messages(served)))
            gate.touch()
            assert served.stop() == 0
            assert not [message for message in messages(served) if "other" in message or "serving on" in message]

    def test_sighup_while_it_loads_does_not_end_it(self, gate: Path) -> None:
        with loading(BUNDLE) as served:
            served.signal(signal.SIGHUP)
            gate.touch()
            served.wait()
            assert served.get("/v2/health/ready").status == 200
            assert served.get("/v2/models/bundle").json()["versions"] == ["1"]

    def test_a_wrong_golden_batch_is_never_ready(self, tmp_path: Path) -> None:
        with Served(mismatched(tmp_path / "wrong"), wait=False) as served:
            assert eventually(lambda: not served.alive, 60)
            assert served.stop() == 3
            assert "golden batch" in error_line(served)
            assert not [message for message in messages(served) if "ready (" in message or "serving on" in message]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere"], ["nowhere"]),
        ([BUNDLE, BUNDLE], ["two models", "'bundle'"]),
        ([BUNDLE, "--backend", "abacus"], ["abacus", "onnxruntime-cpu"]),
        ([f"{BUNDLE}@fp12"], ["fp12"]),
        ([f"a b={BUNDLE}"], ["'a b'"]),
        ([BUNDLE, "--set", "limits.batsch=3"], ["batsch"]),
        ([BUNDLE, "--settings", "none.toml"], ["none.toml"]),
        ([BUNDLE, "--host", "no.such.host.invalid", "--insecure"], ["no.such.host.invalid"]),
    ],
)
@pytest.mark.usefixtures("loggers")
def test_what_cannot_be_served_ends_with_one_line(arguments: list[object], parts: list[str]) -> None:
    done = mpdsgr_here("serve", *arguments, "--port", 0, "--grpc-port", 0)
    assert_input_error(done, *parts)
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_that_is_taken_ends_with_one_line(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"--port": 0, "--grpc-port": 0, option: taken.getsockname()[1]}
        done = mpdsgr("serve", BUNDLE, *(text for pair in ports.items() for text in pair))
        assert_input_error(done, str(ports[option]), option)
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_is_taken_before_the_models_load() -> None:
    with _bound("127.0.0.1", 0) as first, pytest.raises(InputError, match="--port"):
        _bound(*first.getsockname())


def mismatched(out: Path) -> Path:
    """A sealed bundle whose golden logits are another network's."""
    shutil.copytree(BUNDLE, out)
    with np.load(out / "golden.npz") as golden:
        content = dict(golden)
    np.savez(out / "golden.npz", **{**content, "fp32": -content["fp32"]})
    return resealed(out)


class Tale(NamedTuple):
    """What a client saw of one request: an answer's code, or `refused` or `closed` before one byte of it came."""

    id: str
    code: str
    version: str = ""
    logits: NDArray[np.float32] | None = None


class Clients:
    """Clients that ask one request after the other, on connections kept alive, until told to stop.

    Over gRPC where `over` says so. They give up once nobody listens any more.
    """

    def __init__(self, served: Served, over: list[str]) -> None:
        self.served, self.x = served, images()
        self.tales: list[list[Tale]] = [[] for _ in over]
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=getattr(self, f"_{name}"), args=(f"{name}-{i}", self.tales[i]))
            for i, name in enumerate(over)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    @property
    def all(self) -> list[Tale]:
        return [tale for tales in self.tales for tale in tales]

    def seen(self, more: int) -> bool:
        """Wait until each client that goes on has so many further answers."""
        before = list(map(len, self.tales))
        return eventually(
            lambda: all(
                len(tales) >= known + more or not thread.is_alive()
                for tales, known, thread in zip(self.tales, before, self._threads, strict=True)
            ),
            60,
        )

    def _http(self, name: str, tales: list[Tale]) -> None:
        connection = None
        for number in count():
            told = f"{name}-{number}"
            if self._over.is_set():
                break
            try:
                connection = connection or self.served.connect()
            except OSError:
                tales.append(Tale(told, "refused"))
                break
            try:
                connection.socket.sendall(http("POST", INFER, request(self.x), {"X-Request-Id": told}))
                reply = connection.reply()
            except ConnectionError:  # an answer that is cut raises something else
                tales.append(Tale(told, "closed"))
                connection.close()
                connection = None
                continue
            assert reply.headers["x-request-id"] == told
            if reply.status == 200:
                tales.append(Tale(told, "200", reply.json()["model_version"], reply.output()))
            else:
                tales.append(Tale(told, str(reply.status)))
            if reply.headers.get("connection") == "close":
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def _grpc(self, name: str, tales: list[Tale]) -> None:
        with grpc.insecure_channel(self.served.grpc) as channel:
            ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            for number in count():
                told = f"{name}-{number}"
                if self._over.is_set():
                    break
                try:
                    reply = ask(asked(1, "bundle"), metadata=[("x-request-id", told)], timeout=30)
                except grpc.RpcError as error:
                    tales.append(Tale(told, error.code().name))
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        break
                    continue
                logits = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(1, -1)
                tales.append(Tale(told, "200", reply.model_version, logits))


BOTH = ["http"] * 8 + ["grpc"] * 4


class TestEnd:
    def test_sigterm_under_load_loses_no_accepted_request(self) -> None:
        options = {"limits": {"grace_seconds": 0.7}}
        with Served(BUNDLE, "--set", "log.requests=true", **options) as served, Clients(served, BOTH) as clients:
            right = served.post(INFER, request(images())).output()
            assert clients.seen(5)
            served.signal(signal.SIGTERM)
            assert eventually(lambda: served.get("/v2/health/ready").status == 503)
            late = served.post(INFER, request(images()), {"X-Request-Id": "late"})
            assert late.status == 200, "it is not ready, and still answers"
            assert late.headers["connection"] == "close"
            start = time.monotonic()
            assert served.stop() == 0
            assert time.monotonic() - start < 10
            assert eventually(lambda: clients.seen(1))

        tales = clients.all
        codes = Counter(tale.code for tale in tales)
        assert codes.keys() <= {"200", "refused", "closed", "UNAVAILABLE"}, codes
        for tale in tales:
            if tale.logits is not None:
                np.testing.assert_allclose(tale.logits, right, atol=1e-5)
        # the log has a line for each request that the server took: each of them got its answer, and no other did
        accepted = {line["request_id"]: line["code"].replace("OK", "200") for line in served.lines if "code" in line}
        mine = {key: code for key, code in accepted.items() if key.startswith(("http-", "grpc-"))}
        assert mine.items() <= {tale.id: tale.code for tale in tales}.items()
        assert {tale.id for tale in tales if tale.code == "200"} <= mine.keys()
        assert messages(served)[-1] == "stopped; every accepted request was answered"

    def test_a_request_that_arrives_slowly_is_answered_after_sigterm(self) -> None:
        with Served() as served, served.connect() as connection:
            message = http("POST", INFER, request(images()))
            connection.send(message[:-10])
            assert eventually(lambda: served.counted("mpdsgr_in_flight_bytes") > 0)
            served.signal(signal.SIGTERM)
            assert eventually(lambda: any("stopping" in message for message in messages(served)))
            connection.send(message[-10:])
            assert connection.reply().status == 200
            assert connection.closed()
            assert served.stop() == 0

    def test_what_does_not_end_in_time_is_given_up_and_the_log_says_so(self) -> None:
        with Served(limits={"drain_seconds": 0.3}) as served, served.connect() as connection:
            connection.send(http("POST", INFER, request(images()))[:-10])
            assert eventually(lambda: served.counted("mpdsgr_in_flight_bytes") > 0)
            start = time.monotonic()
            assert served.stop() == 0
            assert time.monotonic() - start < 10
            assert messages(served)[-1] == "stopped with 1 requests unanswered after 0.3 s"

    @pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
    def test_sigint_does_not_wait_for_balancers(self, signals: list[signal.Signals]) -> None:
        with Served(limits={"grace_seconds": 600}) as served:
            for one in signals[:-1]:
                served.signal(one)
                assert eventually(lambda: any("stopping" in message for message in messages(served)))
            assert served.stop(signals[-1], 20) == 0

    def test_a_second_sigterm_changes_nothing(self) -> None:
        with Served(limits={"grace_seconds": 0.5}) as served:
            served.signal(signal.SIGTERM)
            assert eventually(lambda: any("stopping" in message for message in messages(served)))
            served.signal(signal.SIGTERM)
            assert served.get("/v2/health/ready").status == 503
            assert served.post(INFER, request(images())).status == 200
            assert served.stop() == 0
            assert messages(served)[-1] == "stopped; every accepted request was answered"


def placed(directory: Path, bundle: Path) -> None:
    """Let the link `directory` show another bundle, at one moment, as a careful operator does."""
    link = directory.with_name("next")
    link.symlink_to(bundle)
    link.rename(directory)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BUNDLE with other weights, golden batch and all."""
    return perturbed(open_bundle(BUNDLE), tmp_path_factory.mktemp("second") / "bundle")


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """A link to BUNDLE that tests turn to others."""
    link = tmp_path / "bundle"
    placed(link, BUNDLE)
    return link


def garbled(out: Path) -> Path:
    """One byte of the network is another."""
    shutil.copytree(BUNDLE, out)
    content = bytearray((out / "model.fp32.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "model.fp32.onnx").write_bytes(content)
    return out


def no_network(out: Path) -> Path:
    """The network's file is none, and the hashes are its own."""
    shutil.copytree(BUNDLE, out)
    (out / "model.fp32.onnx").write_bytes(b"no network at all")
    return resealed(out)


def absent(out: Path) -> Path:
    return out


def version(served: Served) -> str:
    return str(served.get("/status").json()["models"][0]["version"])


class TestHotSwap:
    def test_another_version_takes_over_under_load_and_no_request_fails(self, current: Path, second: Path) -> None:
        with Served(current, "--repository-control") as served:
            x = images()
            logits = {"1": served.post(INFER, request(x)).output()}
            with Clients(served, ["http"] * 3 + ["grpc"] * 2) as clients:
                assert clients.seen(3)
                placed(current, second)
                served.signal(signal.SIGHUP)
                assert eventually(lambda: version(served) == "2", 30)
                assert clients.seen(3)
                placed(current, BUNDLE)
                load = served.post("/v2/repository/models/bundle/load", b"")
                assert load.status == 200
                assert clients.seen(3)
            logits["2"] = right(second, x)
            logits["3"] = logits["1"]
            assert np.abs(logits["1"] - logits["2"]).max() > 0.01
            for tales in clients.tales:
                assert {tale.code for tale in tales} == {"200"}
                versions = [tale.version for tale in tales]
                assert versions == sorted(versions), "an old version answered after a newer one"
                assert set(versions) == {"1", "2", "3"}
                for tale in tales:
                    np.testing.assert_allclose(tale.logits, logits[tale.version], atol=1e-4)
            assert served.get("/v2/models/bundle").json()["versions"] == ["3"]
            assert served.get("/v2/models/bundle/versions/2").status == 404

    def test_a_bundle_that_is_as_it_was_is_not_loaded_again(self, current: Path, second: Path) -> None:
        with Served(current, f"other={BUNDLE}") as served:
            placed(current, second)
            served.signal(signal.SIGHUP)
            assert eventually(lambda: version(served) == "2", 30)
            assert served.get("/v2/models/other").json()["versions"] == ["1"]

    def test_a_bad_version_leaves_the_old_one_serving_and_says_why(
        self, tmp_path: Path, current: Path, second: Path
    ) -> None:
        with Served(current, "--repository-control") as served:
            before = served.post(INFER, request(images())).output()
            for spoilt, reason in (
                (garbled, "model.fp32.onnx"),
                (no_network, "model.fp32.onnx"),
                (mismatched, "golden batch"),
                (absent, "bundle"),
            ):
                placed(current, spoilt(tmp_path / spoilt.__name__))
                load = served.post("/v2/repository/models/bundle/load", b"")
                assert load.status == 400
                assert reason in load.json()["error"]
                (listed,) = served.post("/v2/repository/index", b"").json()
                assert (listed["version"], listed["state"]) == ("1", "READY")
                assert listed["reason"].startswith("version 2 failed: ")
                assert reason in listed["reason"]
                assert served.get("/status").json()["models"][0]["reason"] == listed["reason"]
                known = len(served.lines)
                served.signal(signal.SIGHUP)
                if spoilt is not garbled:  # its manifest is BUNDLE's own, so nothing has changed
                    assert eventually(partial(logged, served, known, reason))
                assert served.get("/v2/health/ready").status == 200
                np.testing.assert_array_equal(served.post(INFER, request(images())).output(), before)
            placed(current, second)
            served.signal(signal.SIGHUP)
            assert eventually(lambda: version(served) == "2", 30)
            assert served.get("/status").json()["models"][0]["reason"] == ""

    def test_unload_and_load(self, current: Path, tmp_path: Path) -> None:
        with Served(current, f"other={BUNDLE}", "--repository-control") as served:
            assert served.post("/v2/repository/models/other/unload", b"").status == 200
            assert served.get("/v2/health/ready").status == 200, "it was wanted so"
            assert served.post(f"{OTHER}/infer", request(images())).status == 404
            assert served.get(f"{OTHER}/ready").status in (404, 503)
            index = {entry["name"]: entry for entry in served.post("/v2/repository/index", b"").json()}
            assert (index["other"]["state"], index["other"]["reason"]) == ("UNAVAILABLE", "unloaded")
            assert [entry["name"] for entry in served.post("/v2/repository/index", {"ready": True}).json()] == [
                "bundle"
            ]
            assert served.post(INFER, request(images())).status == 200
            assert served.post("/v2/repository/models/bundle/unload", b"").status == 200
            placed(current, mismatched(tmp_path / "wrong"))
            assert served.post("/v2/repository/models/bundle/load", b"").status == 400
            assert served.get("/v2/health/ready").status == 200, "what was unloaded makes nobody wait"
            assert served.post("/v2/repository/models/other/load", b"").status == 200
            assert served.get(OTHER).json()["versions"] == ["2"]
            assert served.post(f"{OTHER}/infer", request(images())).status == 200
            assert served.post("/v2/repository/models/nobody/load", b"").status == 404
            assert served.post("/v2/repository/models/nobody/unload", b"").status == 404

    def test_a_request_whose_body_comes_slowly_is_answered_by_the_version_that_is_there_then(
        self, current: Path, second: Path
    ) -> None:
        with Served(current, "--repository-control") as served, served.connect() as connection:
            message = http("POST", INFER, request(images()))
            connection.send(message[:-10])
            assert eventually(lambda: served.counted("mpdsgr_in_flight_bytes") > 0)
            placed(current, second)
            assert served.post("/v2/repository/models/bundle/load", b"").status == 200
            assert served.post(INFER, request(images())).json()["model_version"] == "2"
            connection.send(message[-10:])
            reply = connection.reply()
            assert reply.status == 200, reply
            assert reply.json()["model_version"] == "2"

    def test_models_are_not_loaded_by_request_unless_that_is_wanted(self) -> None:
        with Served() as served:
            for action in ("load", "unload"):
                assert served.post(f"/v2/repository/models/bundle/{action}", b"").status == 403
            with grpc.insecure_channel(served.grpc) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                for ask, asked in (
                    (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="bundle")),
                    (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="bundle")),
                ):
                    with pytest.raises(grpc.RpcError) as refused:
                        ask(asked)
                    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert served.post(INFER, request(images())).json()["model_version"] == "1"

    def test_the_old_version_is_freed(self, current: Path, second: Path) -> None:
        async def test() -> None:
            async with started(current) as server:
                old = weakref.ref(server.repository.model("bundle"))
                asked = request(images(), outputs=[{"name": "firing_rate"}])
                assert (await Client(server).post(INFER, asked)).status == 200
                placed(current, second)
                await server.repository.reload_changed()
                assert server.repository.model("bundle").version == "2"
                async with asyncio.timeout(30):
                    while old() is not None:
                        gc.collect()
                        await asyncio.sleep(0.01)

        asyncio.run(test())


def logged(served: Served, known: int, reason: str) -> bool:
    """Whether an error behind the first `known` lines of the log says so."""
    return any(reason in line["message"] and line["level"] == "error" for line in served.lines[known:])


def right(bundle: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with OnnxRuntime(bundle / "model.fp32.onnx") as network:
        return network(x)


def asked(count: int, model: str, seed: int = 0) -> Any:
    """A request over gRPC."""
    x = images(count, seed)
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="images", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    return message


def test_a_known_sequence_of_requests_is_counted_and_logged() -> None:
    with Served(f"a={BUNDLE}", f"b={BUNDLE}@int8", "--set", "log.requests=true") as served:

        def given_id(count: int, **headers: object) -> str:
            """The id of a request to model a that is answered."""
            reply = served.post("/v2/models/a/infer", request(images(count)), headers)
            assert reply.status == 200
            return reply.headers["x-request-id"]

        assert given_id(3, **{"X-Request-Id": "mine"}) == "mine"
        made = given_id(1)
        long = given_id(1, **{"X-Request-Id": "x" * 200})
        assert made
        assert made != long != "x" * 200
        bad = request(images())
        bad["inputs"][0]["shape"] = [1, 1, 8, 9]
        assert served.post("/v2/models/a/infer", bad).status == 400
        assert served.post("/v2/models/a/infer", request(images(), parameters={"timeout": 1})).status == 504
        assert served.post("/v2/models/c/infer", request(images())).status == 404
        with grpc.insecure_channel(served.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.ModelInfer(asked(2, "b"), metadata=[("x-request-id", "over-grpc")])
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(asked(1, "c"))
        metrics = served.metrics()
        text = served.get("/metrics").body.decode()
        stats = {one["name"]: one for one in served.get("/v2/models/stats").json()["model_stats"]}
        status = {one["name"]: one for one in served.get("/status").json()["models"]}

    def metric(name: str, model: str | None = None, **labels: str) -> float:
        told = {**({} if model is None else {"model": model, "version": "1" if model else ""}), **labels}
        inner = ",".join(f'{key}="{value}"' for key, value in sorted(told.items()))
        return metrics[f"mpdsgr_{name}{{{inner}}}" if told else f"mpdsgr_{name}"]

    for model, protocol, code, number in (
        ("a", "http", "200", 3),
        ("a", "http", "400", 1),
        ("a", "http", "504", 1),
        ("b", "grpc", "OK", 1),
        ("", "http", "404", 1),
        ("", "grpc", "NOT_FOUND", 1),
    ):
        assert metric("requests_total", model, protocol=protocol, code=code) == number
    for model, requests, total in (("a", 3, 5), ("b", 1, 2)):
        assert metric("images_total", model) == metric("batch_images_sum", model) == total
        for histogram in ("request_seconds", "queue_seconds", "inference_seconds", "batch_images"):
            assert metric(f"{histogram}_count", model) == requests
            assert metric(f"{histogram}_bucket", model, le="+Inf") == requests
        assert 0 <= metric("queue_seconds_sum", model) < metric("request_seconds_sum", model) < 60
        assert 0 < metric("inference_seconds_sum", model) < metric("request_seconds_sum", model)
        assert metric("model_ready", model) == 1
        assert metrics[f'mpdsgr_queued_images{{model="{model}"}}'] == 0
        assert stats[model]["inference_count"] == status[model]["inferences"] == total
        assert stats[model]["inference_stats"]["success"]["count"] == requests
    assert metric("batch_images_bucket", "a", le="1.0") == 2
    assert metric("batch_images_bucket", "a", le="2.0") == 2
    assert metric("batch_images_bucket", "a", le="4.0") == 3
    assert metric("dropped_total", "a", reason="deadline") == 1
    assert status["a"]["errors"] == stats["a"]["inference_stats"]["fail"]["count"] == 2
    assert metric("in_flight_bytes") == 0
    assert metric("connections") == 1  # the one that asks
    assert metrics["process_resident_memory_bytes"] > 0
    checked(text)

    assert all(line["level"] for line in served.lines), "a line is not JSON"
    assert all(abs(line["time"] - time.time()) < 600 for line in served.lines)
    lines = {line["request_id"]: line for line in served.lines if "request_id" in line}
    assert {"mine", made, long, "over-grpc"} <= lines.keys()
    mine = lines["mine"]
    assert (mine["protocol"], mine["method"], mine["path"]) == ("http", "POST", "/v2/models/a/infer")
    assert (mine["model"], mine["version"], mine["code"], mine["images"]) == ("a", "1", "200", 3)
    assert 0 < mine["ms"] < 60_000
    assert (lines["over-grpc"]["model"], lines["over-grpc"]["code"], lines["over-grpc"]["images"]) == ("b", "OK", 2)
    (refused,) = (line for line in lines.values() if line["code"] == "400")
    assert "[1, 1, 8, 9]" in refused["message"]
    assert refused["model"] == "a"
    (late,) = (line for line in lines.values() if line["code"] == "504")
    assert late["level"] == "warning"


def checked(text: str) -> None:
    """What Prometheus itself finds wrong with metrics, where it is installed, must be nothing."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in families.values())
    if shutil.which("promtool") is not None:
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.usefixtures("loggers")
def test_lines_of_other_packages_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    log_json()
    logging.getLogger("asyncio").error("a task %s", "broke")
    logging.getLogger("asyncio").info("of no interest")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
    error, warning = map(json.loads, capsys.readouterr().err.splitlines())
    assert (error["level"], error["message"]) == ("error", "a task broke")
    assert "soon gone" in warning["message"]


def test_answers_are_not_logged_unless_that_is_wanted() -> None:
    with Served() as served:
        served.post(INFER, request(images()), {"X-Request-Id": "good"})
        served.post("/v2/models/nobody/infer", request(images()), {"X-Request-Id": "bad"})
    (line,) = (line for line in served.lines if "request_id" in line)
    assert (line["request_id"], line["code"], line["level"]) == ("bad", "404", "info")


def test_metrics_are_read_while_others_are_counted() -> None:
    async def test() -> None:
        async with started(BUNDLE) as server:
            client = Client(server)
            codes = server.repository.model("bundle").statistics.codes
            numbers = count()
            for _ in range(5):
                reading = asyncio.ensure_future(client.get("/metrics"))
                while not reading.done():
                    for _ in range(200):  # keys that nobody has seen, while a thread reads them all
                        codes["http", str(next(numbers))] += 1
                    await asyncio.sleep(0)
                assert (await reading).status == 200
                codes.clear()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asyncio.run(test())
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture(scope="session")
def spans() -> InMemorySpanExporter:
    """Where spans of this process go from now on."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_an_inference_is_a_span_below_the_callers(spans: InMemorySpanExporter) -> None:
    async def test() -> None:
        async with started(BUNDLE) as server:
            told = {"traceparent": PARENT, "x_request_id": "mine"}
            assert (await Client(server).post(INFER, request(images()), **told)).status == 200
            assert (await Client(server).post(INFER, request(images()))).status == 200
            listening = await Grpc.start(server, "127.0.0.1", 0, None)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
                ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
                await ask(asked(1, "bundle"), metadata=[("traceparent", PARENT)])
            await listening.stop(1)

    spans.clear()
    asyncio.run(test())
    below, alone, over_grpc = spans.get_finished_spans()
    for span in (below, alone, over_grpc):
        assert span.name == "infer"
        assert span.kind is trace.SpanKind.SERVER
        assert span.attributes
        assert (span.attributes["model"], span.attributes["version"]) == ("bundle", "1")
    for span in (below, over_grpc):
        assert span.parent
        assert f"{span.context.trace_id:032x}-{span.parent.span_id:016x}" == PARENT[3:-3]
    assert below.attributes
    assert below.attributes["request_id"] == "mine"
    assert alone.parent is None


def test_without_opentelemetry_nothing_is_traced_and_nothing_breaks() -> None:
    code = f"""
import asyncio, sys
sys.modules["opentelemetry"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
from asgi import Client, started
from served import BUNDLE, INFER, images, request
async def test():
    async with started(BUNDLE) as server:
        print((await Client(server).post(INFER, request(images()), traceparent={PARENT!r})).status)
asyncio.run(test())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("200\n", "")
