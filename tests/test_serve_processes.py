"""Several processes that are one server: their counts, limits, reloads, deaths and end."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr_here, perturbed
from served import BUNDLE, INFER, LARGE, VERSION, Served, eventually, http, images, request
from served_clients import Clients, assert_all_answered, messages, mismatched, placed, right

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.serving import served_model
from mpdsgr_deploy.serving.group import Group
from mpdsgr_deploy.serving.served_model import OpenedBundle
from mpdsgr_deploy.serving.settings import Limits
from mpdsgr_deploy.serving.supervisor import Watch

TWO = ("--processes", 2)


def processes(served: Served) -> list[int]:
    """Those that serve, not the one that supervises them."""
    return [int(pid) for pid in Path(f"/proc/{served.pid}/task/{served.pid}/children").read_text().split()]


def by_process(served: Served, name: str, **labels: str) -> list[float]:
    return [served.counted(name, process=str(index), **labels) for index in (0, 1)]


@pytest.fixture(scope="module")
def two() -> Iterator[Served]:
    with Served(BUNDLE, *TWO) as served:
        yield served


class TestTogether:
    def test_connections_are_spread_and_every_process_answers_right(self, two: Served) -> None:
        connections = [two.connect() for _ in range(20)]
        expected = right(BUNDLE, images())
        for connection in connections:
            connection.send(http("POST", INFER, request(images())))
            np.testing.assert_allclose(connection.reply().output(), expected, atol=1e-5)
        few, many = sorted(by_process(two, "mpdsgr_connections"))
        assert few >= 9
        assert many <= 12
        for connection in connections:
            connection.close()

    def test_counts_add_up_whichever_process_tells(self, two: Served) -> None:
        before = two.counted("mpdsgr_requests_total", model="bundle", code="200")
        with Clients(two, ["http"] * 4 + ["grpc"] * 4) as clients:
            assert clients.seen(5)
        answered = Counter(tale.code for tale in clients.all)
        assert answered.keys() == {"200"}
        total = before + answered["200"]
        for _ in range(4):  # connections, which reach either
            counted = [two.counted("mpdsgr_requests_total", model="bundle", code=code) for code in ("200", "OK")]
            assert sum(counted) == total
            assert two.counted("mpdsgr_request_seconds_count", model="bundle") == total
            (stats,) = two.get("/v2/models/stats").json()["model_stats"]
            assert stats["inference_stats"]["success"]["count"] == stats["inference_count"] == total
            status = two.get("/status").json()
            assert status["server"]["processes"] == 2
            assert status["models"][0]["inferences"] == total
            assert status["models"][0]["recent"]["requests_per_second"] > 0

    def test_the_page_shows_how_many_there_are(self, two: Served) -> None:
        assert b"status.server.processes" in two.get("/").body

    def test_the_log_says_which_process_a_line_is_of(self, two: Served) -> None:
        assert {line["process"] for line in two.lines if "is ready" in line["message"]} == {0, 1}
        assert len([line for line in messages(two) if line.startswith("serving on")]) == 1


class TestDeath:
    def test_a_process_that_is_killed_is_replaced_and_the_others_go_on(self) -> None:
        with Served(BUNDLE, *TWO) as served, Clients(served, ["http"] * 4) as clients:
            assert clients.seen(2)
            victim, survivor = processes(served)
            os.kill(victim, signal.SIGKILL)
            assert eventually(lambda: len(set(processes(served)) - {victim, survivor}) == 1)
            assert clients.seen(2)
            assert eventually(lambda: by_process(served, "mpdsgr_process_restarts_total") == [1, 0])
            assert eventually(lambda: all(by_process(served, "mpdsgr_model_ready")))
            assert served.get("/v2/health/ready").status == 200
            assert clients.seen(2)
            code = served.stop()
        tales = clients.all
        assert {tale.code for tale in tales} <= {"200", "closed", "refused"}
        expected = right(BUNDLE, images())
        for tale in tales:
            if tale.logits is not None:
                np.testing.assert_allclose(tale.logits, expected, atol=1e-5)
        (line,) = [text for text in messages(served) if "signal 9" in text]
        lost = int(re.findall(r"with (\d+) requests in progress; another starts in 0.5 s", line)[0])
        assert code == (4 if lost else 0)

    def test_one_that_takes_its_place_serves_what_the_others_serve(self, tmp_path: Path) -> None:
        """The bundle on disk is another by then, and nobody has asked to load it."""
        link = tmp_path / "bundle"
        placed(link, BUNDLE)
        second = perturbed(open_bundle(BUNDLE), tmp_path / "second")
        newer = open_bundle(second).manifest.digest[:12]
        with Served(link, *TWO) as served:
            placed(link, second)
            os.kill(processes(served)[0], signal.SIGKILL)
            assert eventually(lambda: any("is not the bundle that is served" in text for text in messages(served)))
            for _ in range(4):
                assert served.post(INFER, request(images())).json()["model_version"] == VERSION
            served.signal(signal.SIGHUP)
            for version, there in ((newer, 2), (VERSION, 0)):
                ready = {"model": "bundle", "version": version}
                assert eventually(lambda r=ready, n=there: served.counted("mpdsgr_model_ready", **r) == n)
            for _ in range(4):
                reply = served.post(INFER, request(images()))
                assert reply.json()["model_version"] == newer
                np.testing.assert_allclose(reply.output(), right(second, images()), atol=1e-5)

    def test_one_that_hangs_is_killed_and_replaced_but_not_one_that_computes(self, tmp_path: Path) -> None:
        known = (BUNDLE, *TWO, "--set", "machine.hang_seconds=1.5")
        with Served(*known, gate=tmp_path / "gate", limits={"batch": LARGE, "queue": 2 * LARGE}) as served:
            both = processes(served)
            with served.hold():
                time.sleep(2.0)
            assert processes(served) == both
            os.kill(both[0], signal.SIGSTOP)
            assert eventually(lambda: len(set(processes(served)) - set(both)) == 1)
            assert eventually(lambda: by_process(served, "mpdsgr_process_restarts_total", reason="hung") == [1, 0])
            assert eventually(lambda: all(by_process(served, "mpdsgr_model_ready")))
            assert by_process(served, "mpdsgr_process_restarts_total", reason="died") == [0, 0]
            assert served.post(INFER, request(images())).json()["model_version"] == VERSION
            assert served.stop() == 0
        (line,) = [line for line in served.lines if "event loop" in line["message"]]
        assert line["message"] == (
            "process 0 was killed because its event loop had not run for over 1.5 s, with 0 requests in progress; "
            "another starts in 0.5 s"
        )
        assert line["level"] == "error"

    def test_none_outlives_the_supervisor(self) -> None:
        with Served(BUNDLE, *TWO) as served:
            orphans = processes(served)
            served.signal(signal.SIGKILL)
            assert eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in orphans))


class TestEnd:
    def test_sigterm_under_load_loses_no_accepted_request(self) -> None:
        options = {"limits": {"grace_seconds": 600}}  # however long it takes to see that it is not ready any more
        told = (BUNDLE, *TWO, "--set", "log.requests=true")
        with Served(*told, **options) as served, Clients(served, ["http"] * 8 + ["grpc"] * 4) as clients:
            assert clients.seen(3)
            served.signal(signal.SIGTERM)
            assert eventually(lambda: served.get("/v2/health/ready").status == 503)
            for _ in range(10):  # connections of their own, so that both processes get some
                late = served.post(INFER, request(images()), {"X-Request-Id": "late"})
                assert late.status == 200, "it is not ready, and still answers"
            assert served.stop(signal.SIGINT) == 0
        tales = clients.all
        assert {tale.code for tale in tales} <= {"200", "refused", "closed", "UNAVAILABLE"}
        assert_all_answered(served, tales)
        assert messages(served)[-1] == "stopped; every accepted request was answered"

    def test_what_waits_to_be_accepted_is_answered_too(self) -> None:
        with Served(BUNDLE, *TWO) as served:
            both = processes(served)
            for pid in both:
                os.kill(pid, signal.SIGSTOP)
            connections = [served.connect() for _ in range(200)]
            for connection in connections:
                connection.send(http("POST", INFER, request(images())))
            served.signal(signal.SIGTERM)
            for pid in both:
                os.kill(pid, signal.SIGCONT)
            for connection in connections:
                assert connection.reply().status == 200
                connection.close()
            assert served.stop() == 0

    def test_what_is_lost_is_told_in_sum(self) -> None:
        with Served(BUNDLE, *TWO, limits={"drain_seconds": 0.3}) as served:
            slow = [served.connect() for _ in range(4)]
            for connection in slow:
                connection.send(http("POST", INFER, request(images()))[:-10])
            assert eventually(lambda: min(by_process(served, "mpdsgr_in_flight_bytes")) > 0)
            assert served.stop() == 4
            assert messages(served)[-1] == "stopped with 4 requests unanswered after 0.3 s"
            for connection in slow:
                connection.close()


class TestStart:
    @pytest.mark.usefixtures("loggers")
    @pytest.mark.parametrize("option", ["--port", "--grpc-port"])
    def test_a_port_that_is_taken_ends_with_one_line(self, two: Served, option: str) -> None:
        ports = {"--port": 0, "--grpc-port": 0, option: two.port if option == "--port" else two.grpc_port}
        done = mpdsgr_here("serve", BUNDLE, *TWO, *(text for pair in ports.items() for text in pair))
        assert_input_error(done, str(ports[option]), option)
        assert len(done.stderr.strip().splitlines()) == 1

    def test_a_network_that_cannot_serve_ends_all_with_one_line(self, tmp_path: Path) -> None:
        with Served(mismatched(tmp_path / "wrong"), *TWO, wait=False) as served:
            assert eventually(lambda: not served.alive)
            assert served.stop() == 3
            (line,) = [line["message"] for line in served.lines if not line["level"]]
            assert "golden batch" in line

    @pytest.mark.usefixtures("loggers")
    def test_a_request_cannot_change_one_of_them_alone(self) -> None:
        done = mpdsgr_here("serve", BUNDLE, *TWO, "--repository-control", "--port", 0, "--grpc-port", 0)
        assert_input_error(done, "--repository-control", "--processes")


class TestHeartbeat:
    """hang_seconds is 10, and the supervisor looks once a second."""

    def seconds_until_hung(self, *, beats: int = 1, opening: int = 0) -> int:
        watch, numbers = Watch(10, 0), Group().own
        numbers.beats, numbers.opening = beats, opening
        return next(second for second in range(1, 1000) if watch.is_hung(numbers, second))

    def test_a_process_may_stand_still_for_so_long_and_longer_while_it_opens_a_network(self) -> None:
        assert self.seconds_until_hung() == 12  # since the first look at its only beat
        assert self.seconds_until_hung(beats=0) == 101
        assert self.seconds_until_hung(opening=1) == 102

    def test_a_process_that_beats_is_not_hung(self) -> None:
        watch, numbers = Watch(10, 0), Group().own
        for second in range(0, 100, 5):
            numbers.beats += 1
            assert not any(watch.is_hung(numbers, second + look) for look in range(5))

    def test_a_supervisor_that_was_stopped_itself_takes_none_for_hung(self) -> None:
        watch, numbers = Watch(10, 0), Group().own
        numbers.beats = 1
        assert not any(watch.is_hung(numbers, now) for now in (1, 1000, 1001))


def test_limits_are_of_all_processes_together() -> None:
    share = Limits(connections=1000, queue=7, in_flight_bytes=300, batch=64).share(3)
    assert (share.connections, share.queue, share.in_flight_bytes, share.batch) == (334, 3, 100, 64)


def test_threads_are_a_process_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the bundle was measured with all of them."""
    asked: list[Any] = []
    measured = RuntimeSettings(threads=4)

    def measure(*arguments: Any) -> RuntimeSettings:
        asked.append(arguments[-1])
        return RuntimeSettings(threads=2)

    monkeypatch.setattr(served_model, "measured_at_start", measure)
    monkeypatch.setattr(served_model.machine_settings, "prepared_settings", lambda *_: measured)
    opened = OpenedBundle(open_bundle(BUNDLE), "fp32")
    assert opened.measure("onnxruntime-cpu", 2, None) == RuntimeSettings(threads=2)
    assert opened.measure("onnxruntime-cpu", 4, None) == measured
    assert asked == [2]
