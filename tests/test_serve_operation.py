"""A server's life: loading, readiness, signals, and the end under load."""

import os
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr, mpdsgr_here
from ports import free_ports
from served import BUNDLE, INFER, VERSION, Served, eventually, http, images, request
from served_clients import OTHER, Clients, answers, assert_all_answered, messages, mismatched

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.server import _bound


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
    (port,) = free_ports(1)
    served = Served(*arguments, "--port", port, wait=False, **options)
    served.port = port
    if not eventually(lambda: answers(served)):
        served.stop(signal.SIGKILL)
        raise AssertionError(served.lines)
    return served


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
            assert served.get("/v2/models/bundle").json()["versions"] == [VERSION]

    def test_a_wrong_golden_batch_is_never_ready(self, tmp_path: Path) -> None:
        with Served(mismatched(tmp_path / "wrong"), wait=False) as served:
            assert eventually(lambda: not served.alive)
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


BOTH = ["http"] * 8 + ["grpc"] * 4


class TestEnd:
    def test_sigterm_under_load_loses_no_accepted_request(self) -> None:
        options = {"limits": {"grace_seconds": 600}}  # however long it takes to see that it still answers
        with Served(BUNDLE, "--set", "log.requests=true", **options) as served, Clients(served, BOTH) as clients:
            right = served.post(INFER, request(images())).output()
            assert clients.seen(5)
            served.signal(signal.SIGTERM)
            assert eventually(lambda: served.get("/v2/health/ready").status == 503)
            late = served.post(INFER, request(images()), {"X-Request-Id": "late"})
            assert late.status == 200, "it is not ready, and still answers"
            assert late.headers["connection"] == "close"
            assert served.stop(signal.SIGINT) == 0
            assert eventually(lambda: clients.seen(1))

        tales = clients.all
        codes = Counter(tale.code for tale in tales)
        assert codes.keys() <= {"200", "refused", "closed", "UNAVAILABLE"}, codes
        for tale in tales:
            if tale.logits is not None:
                np.testing.assert_allclose(tale.logits, right, atol=1e-5)
        assert_all_answered(served, tales)
        assert messages(served)[-1] == "stopped; every accepted request was answered"

    def test_what_waits_to_be_accepted_is_answered_too(self) -> None:
        """The system accepts connections before the server does; they die with a listener that is just closed."""
        with Served() as served:
            right = served.post(INFER, request(images())).output()
            served.signal(signal.SIGSTOP)
            connections = [served.connect() for _ in range(300)]
            for connection in connections:
                connection.send(http("POST", INFER, request(images())))
            served.signal(signal.SIGTERM)
            served.signal(signal.SIGCONT)
            for connection in connections:
                reply = connection.reply()
                assert (reply.status, reply.headers["connection"]) == (200, "close")
                np.testing.assert_allclose(reply.output(), right, atol=1e-5)
                connection.close()
            assert served.stop() == 0

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
            assert served.stop() == 4
            assert messages(served)[-1] == "stopped with 1 requests unanswered after 0.3 s"

    @pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
    def test_sigint_does_not_wait_for_balancers(self, signals: list[signal.Signals]) -> None:
        with Served(limits={"grace_seconds": 600}) as served:
            for one in signals[:-1]:
                served.signal(one)
                assert eventually(lambda: any("stopping" in message for message in messages(served)))
            assert served.stop(signals[-1]) == 0

    def test_a_second_sigterm_changes_nothing(self) -> None:
        with Served(limits={"grace_seconds": 600}) as served:
            served.signal(signal.SIGTERM)
            assert eventually(lambda: any("stopping" in message for message in messages(served)))
            served.signal(signal.SIGTERM)
            assert served.get("/v2/health/ready").status == 503
            assert served.post(INFER, request(images())).status == 200
            assert served.stop(signal.SIGINT) == 0
            assert messages(served)[-1] == "stopped; every accepted request was answered"
