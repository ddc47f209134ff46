"""mpdsgr bench as a command: what it prints, and its figures of time and CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr_here
from loading import INPUTS, linear, load
from oip_server import OipServer

from mpdsgr_deploy.serving.load import LoadOutcome
from mpdsgr_deploy.serving.load.load_measurement import percentile


@pytest.mark.parametrize("count", [1, 2, 9, 10, 99, 100, 101, 999, 1000, 5000])
def test_percentiles_are_numpys_where_enough_requests_stand_behind_them(count: int) -> None:
    seconds = np.random.default_rng(count).exponential(size=count).tolist()
    for percent, least in ((50, 2), (90, 10), (99, 100), (99.9, 1000)):
        expected = float(np.percentile(seconds, percent)) if count >= least else None
        assert percentile(seconds, percent) == expected


def test_cpu_comes_from_the_servers_metrics_and_warns_of_a_busy_tool() -> None:
    spent = iter([100.0, 100.5])
    page = "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total {}\nprocess_cpu_seconds_totals 7\n"
    with OipServer(linear, INPUTS, metrics=lambda: page.format(next(spent))) as server:
        outcome = load(server)
    assert outcome.server_cpu_ms == pytest.approx(10.0)
    busy = LoadOutcome(outcome.load, 1, outcome.tally, None, 0.95 * outcome.tally.busy, "")
    assert busy.server_cpu_ms is None
    assert busy.warnings == [
        "concurrency 4: this tool took 95% of a CPU core, so the figures show its limit and not the server's"
    ]


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the tests\n\nsecret\nother\n")
    np.save(tmp_path / "images.npy", np.zeros((3, 1, 8, 8), np.uint8))
    with OipServer(linear, INPUTS, key="secret") as server:
        base = ["bench", "--url", server.url, "--requests", "20", "--api-key-file", tmp_path / "keys"]
        table = mpdsgr_here(*base, "--concurrency", "1,2")
        as_json = mpdsgr_here(*base, "--rate", "400", "--json", "--batch", "2", "--images", tmp_path / "images.npy")
        stranger = mpdsgr_here("bench", "--url", server.url)
    assert table.returncode == as_json.returncode == 0, table.stderr + as_json.stderr
    assert any(line.split()[:2] == ["2", "20"] for line in table.stdout.splitlines())
    where = f"perf_analyzer -m net -u 127.0.0.1:{server.port} -i http -b"
    shape, bearer = "--shape=images:1,8,8", '-H "Authorization: Bearer $KEY"'
    line = f"{where} 1 --concurrency-range=2 --measurement-interval=10000 --percentile=99 {shape} {bearer}"
    assert line in table.stdout.splitlines()[-1]
    assert "secret" not in table.stdout + as_json.stdout
    result = json.loads(as_json.stdout)
    (measured,) = result.pop("loads")
    assert result == {"url": server.url, "server": "test 1", "batch": 2, "tensors": "binary", "warnings": []}
    assert measured["perf_analyzer"].startswith(f"{where} 2 --request-rate-range=400 --request-distribution=poisson")
    assert (measured["loop"], measured["rate"], measured["requests"], measured["errors"]) == ("open", 400.0, 20, {})
    assert measured["latency_ms"]["p50"] <= measured["latency_ms"]["p90"]
    assert measured["latency_ms"]["p99"] is measured["server_cpu_ms_per_request"] is None
    assert_input_error(stranger, "answers 401", "who are you?", "give --api-key-file")


def test_errors_are_one_line(tmp_path: Path) -> None:
    with OipServer(linear, INPUTS, most=4) as server:
        too_large = mpdsgr_here("bench", "--url", server.url, "--batch", "5")
        unknown = mpdsgr_here("bench", "--url", server.url.replace("net", "nut"))
        both = mpdsgr_here("bench", "--url", server.url, "--rate", "1", "--concurrency", "1")
        zero = mpdsgr_here("bench", "--url", server.url, "--rate", "0")
        missing = mpdsgr_here("bench", "--url", server.url, "--images", tmp_path / "no.npy")
    gone = mpdsgr_here("bench", "--url", server.url)
    assert_input_error(gone, f"cannot reach {server.url}", "is the server running?")
    assert_input_error(too_large, "answers 400 to 5 images", "a batch of 5 is above 4")
    assert_input_error(unknown, "answers 404")
    assert_input_error(both, "give only one of them")
    assert_input_error(zero, "--rate '0': write numbers from 0.001")
    assert_input_error(missing, "no.npy")
    assert_input_error(mpdsgr_here("bench", "--url", "localhost:8000"), "names no model")


def test_a_keyboard_interrupt_prints_what_was_measured_until_then() -> None:
    script = (  # a shell's background jobs begin with SIGINT ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mpdsgr_deploy.cli import main; main()"
    )
    with OipServer(linear, INPUTS) as server:
        command = [sys.executable, "-c", script, "bench", "--url", server.url, "--json", "--concurrency", "2,4"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
        while len(server.times) < 2 or time.monotonic() < server.times[1] + 1.5:  # warm, and some way into the load
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (measured,) = json.loads(out)["loads"]
    assert 0 < measured["requests"] < len(server.times)
    assert measured["errors"] == {}
    assert err.decode().splitlines()[-1].startswith("interrupted; the figures cover what was measured before")
