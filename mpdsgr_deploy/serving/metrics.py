"""The server's metrics in the text format of Prometheus."""

import asyncio
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from shutil import which

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.statistics import Histogram

MODEL = ("model", "version")
ESTABLISHED = "01"  # state of a row in /proc/net/tcp
HISTOGRAMS = {  # name of a metric -> name in `Statistics`, and help text
    "request_seconds": ("request", "Seconds from the arrival of a request until its outputs are computed."),
    "queue_seconds": ("queue", "Seconds that a request waits for its inference."),
    "inference_seconds": ("inference", "Seconds of the inference of a batch."),
    "batch_images": ("batch", "Number of images in a batch."),
}


async def text(server: Server) -> bytes:
    """Return all current metrics, with the label `process` if the server has several processes.

    The counts of a process that dies are lost, and the process that replaces it starts at 0, as Prometheus expects.
    """
    group = server.group
    metrics, gpu_memory = await asyncio.gather(asyncio.to_thread(families, server), asyncio.to_thread(_gpu_memory))
    if group.processes > 1:
        metrics = _by_process({group.index: metrics, **await group.ask("metrics")})
    return generate_latest(Collected([*metrics, *gpu_memory]))


def families(server: Server) -> list[Metric]:
    return [*_counts(server), *ProcessCollector(registry=None).collect()]


def _by_process(metrics: Mapping[int, Iterable[Metric]]) -> list[Metric]:
    """Return the families of all processes, each sample with the index of its process as a label."""
    merged: dict[str, Metric] = {}
    for index, of_process in sorted(metrics.items()):
        for metric in of_process:
            family = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                family.samples.append(sample._replace(labels={**sample.labels, "process": str(index)}))
    return list(merged.values())


class Collected(Collector):
    """A collector that returns metrics that were collected before."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _counts(server: Server) -> Iterator[Metric]:
    """Yield the metrics of this process's requests, models and connections.

    It runs in a thread while the event loop goes on counting, so it reads a copy of every mapping, made by
    `dict(mapping)`: the tuples of `list(mapping.items())` may trigger a garbage collection and thus a thread switch.
    """
    yield from _of_models(server)
    yield GaugeMetricFamily("mpdsgr_in_flight_bytes", "Bytes of the requests in memory.", server.memory.used)
    yield GaugeMetricFamily("mpdsgr_connections", "Number of open HTTP connections.", server.counts.connections)
    yield from _grpc_connections(server.grpc_port)
    if server.group.processes > 1:
        restarts = CounterMetricFamily(
            "mpdsgr_process_restarts",
            "Number of server processes that were replaced because they died or hung.",
            labels=("reason",),
        )
        restarts.add_metric(["died"], server.counts.died)
        restarts.add_metric(["hung"], server.counts.hung)
        yield restarts


def _of_models(server: Server) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "mpdsgr_requests", "Number of requests answered, with or without an error.", labels=(*MODEL, "protocol", "code")
    )
    images = CounterMetricFamily("mpdsgr_images", "Number of images classified.", labels=MODEL)
    dropped = CounterMetricFamily(
        "mpdsgr_dropped", "Number of requests that were refused or dropped before inference.", labels=(*MODEL, "reason")
    )
    ready = GaugeMetricFamily("mpdsgr_model_ready", "1 if the model is ready, else 0.", labels=MODEL)
    info = GaugeMetricFamily(
        "mpdsgr_model_info",
        "Always 1; its labels describe the bundle that is served.",
        labels=(*MODEL, "digest", "precision", "backend"),
    )
    loads = CounterMetricFamily(
        "mpdsgr_loads", "Number of times that a bundle was loaded, by result.", labels=("model", "result")
    )
    queued = GaugeMetricFamily("mpdsgr_queued_images", "Number of images that wait for inference.", labels=("model",))
    histograms = {
        name: HistogramMetricFamily(f"mpdsgr_{name}", help_text, labels=MODEL)
        for name, (_, help_text) in HISTOGRAMS.items()
    }
    for entry in server.repository:
        name, model = entry.source.name, entry.model
        labels = [name, model.version if model else ""]
        ready.add_metric(labels, float(model is not None))
        loads.add_metric([name, "ok"], entry.loads)
        loads.add_metric([name, "failed"], entry.failed_loads)
        if model is None:
            continue
        info.add_metric([*labels, model.digest, model.source.precision, model.backend], 1)
        counts = model.statistics
        for (protocol, code), number in dict(counts.codes).items():
            requests.add_metric([*labels, protocol, code], number)
        images.add_metric(labels, counts.images)
        for reason, number in dict(counts.dropped).items():
            dropped.add_metric([*labels, reason], number)
        queued.add_metric([name], model.lane.images)
        for family, (attribute, _) in HISTOGRAMS.items():
            histogram = getattr(counts, attribute)
            histograms[family].add_metric(labels, _buckets(histogram), histogram.sum)
    for (protocol, code), number in dict(server.other_codes).items():
        requests.add_metric(["", "", protocol, code], number)
    yield from (requests, images, dropped, ready, info, loads, queued, *histograms.values())


def _grpc_connections(port: int | None) -> Iterable[Metric]:
    """Yield the number of TCP connections to this process's gRPC port, which gRPC does not report, if /proc has it."""
    if port is None:
        return
    ending, open_now = f":{port:04X}", 0
    try:
        open_files = _open_files()
        for name in ("tcp", "tcp6"):
            rows = (line.split(None, 10) for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:])
            connections = (row for row in rows if row[1].endswith(ending) and row[3] == ESTABLISHED)
            open_now += sum(f"socket:[{row[9]}]" in open_files for row in connections)
    except OSError:
        return
    yield GaugeMetricFamily("mpdsgr_grpc_connections", "Number of open gRPC connections.", open_now)


def _open_files() -> set[str]:
    names = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor was closed meanwhile
            names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return names


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


def _gpu_memory() -> list[Metric]:
    """Return the GPU memory that nvidia-smi reports, in bytes; an empty list without nvidia-smi."""
    if which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    used = GaugeMetricFamily(
        "mpdsgr_gpu_memory_used_bytes", "Bytes of GPU memory in use by all processes.", labels=("gpu",)
    )
    total = GaugeMetricFamily("mpdsgr_gpu_memory_total_bytes", "Bytes of GPU memory in total.", labels=("gpu",))
    for line in lines:
        gpu, *megabytes = (field.strip() for field in line.split(","))
        for family, value in zip((used, total), megabytes, strict=True):
            family.add_metric([gpu], float(value) * 2**20)
    return [used, total]
