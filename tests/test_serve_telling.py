"""What a server tells: its log, its metrics, its traces."""

import asyncio
import gc
import json
import logging
import shutil
import subprocess
import sys
import time
import warnings
from itertools import count
from pathlib import Path

import grpc
import pytest
from asgi import Client, started
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from served import BUNDLE, INFER, VERSION, Served, images, request
from served_clients import asked
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.serving.grpc import start_grpc
from mpdsgr_deploy.serving.logs import LONGEST_PATH, log_json


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
        assert served.post(f"/v2/models/{300 * 'c'}/infer", request(images())).status == 404
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
        told = {**({} if model is None else {"model": model, "version": VERSION if model else ""}), **labels}
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
    assert (mine["model"], mine["version"], mine["code"], mine["images"]) == ("a", VERSION, "200", 3)
    assert 0 < mine["ms"] < 60_000
    assert mine["peer"].startswith("127.0.0.1:")
    assert "127.0.0.1:" in lines["over-grpc"]["peer"].replace("%3A", ":")
    assert {len(line["path"]) for line in lines.values() if line["code"] == "404"} == {LONGEST_PATH}
    assert status["a"]["recent"]["latency_ms"]["p99"] is None, "of three requests"
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


def _seen(phase: str, _: dict[str, int]) -> None:
    for _turn in range(20):  # long enough for another thread to get a turn
        phase.upper()


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

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)  # a collection runs Python code in the midst of what else is one step
    gc.callbacks.append(_seen)
    try:
        asyncio.run(test())
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(_seen)


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
            listening = await start_grpc(server, "127.0.0.1", 0, None)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
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
        assert (span.attributes["model"], span.attributes["version"]) == ("bundle", VERSION)
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
from served import BUNDLE, VERSION, INFER, images, request
async def test():
    async with started(BUNDLE) as server:
        print((await Client(server).post(INFER, request(images()), traceparent={PARENT!r})).status)
asyncio.run(test())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("200\n", "")
