"""What the server counts, in Prometheus' text form."""

import subprocess
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from shutil import which

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.statistics import Histogram

MODEL = ("model", "version")
ESTABLISHED = "01"  # state of a row in /proc/net/tcp
HISTOGRAMS = {  # a metric's name to that in `Statistics`, and what it tells
    "request_seconds": ("request", "From a request's arrival to its outputs."),
    "queue_seconds": ("queue", "A request's time before its inference."),
    "inference_seconds": ("inference", "The inference of a batch."),
    "batch_images": ("batch", "Images of a batch."),
}


def text(server: Server) -> bytes:
    """All metrics as they are now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Counts(server))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class Counts:
    """A collector of what the models' statistics hold; nothing is counted twice.

    It runs in a thread while the event loop counts on, so it reads a copy of every mapping: of `dict(mapping)`, not
    of `list(mapping.items())`, whose tuples may set off a garbage collection and with it a change of thread.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("mpdsgr_requests", "Requests answered.", labels=(*MODEL, "protocol", "code"))
        images = CounterMetricFamily("mpdsgr_images", "Images computed.", labels=MODEL)
        dropped = CounterMetricFamily("mpdsgr_dropped", "Requests not computed.", labels=(*MODEL, "reason"))
        ready = GaugeMetricFamily("mpdsgr_model_ready", "1 if the model answers.", labels=MODEL)
        info = GaugeMetricFamily(
            "mpdsgr_model_info", "1; what is served.", labels=(*MODEL, "digest", "precision", "backend")
        )
        loads = CounterMetricFamily("mpdsgr_loads", "Times a bundle was opened.", labels=("model", "result"))
        queued = GaugeMetricFamily("mpdsgr_queued_images", "Images that wait.", labels=("model",))
        histograms = {
            name: HistogramMetricFamily(f"mpdsgr_{name}", help_text, labels=MODEL)
            for name, (_, help_text) in HISTOGRAMS.items()
        }
        for entry in self._server.repository:
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
        for (protocol, code), number in dict(self._server.other_codes).items():
            requests.add_metric(["", "", protocol, code], number)
        yield from (requests, images, dropped, ready, info, loads, queued, *histograms.values())
        yield GaugeMetricFamily("mpdsgr_in_flight_bytes", "Bytes of requests in memory.", self._server.memory.used)
        yield GaugeMetricFamily("mpdsgr_connections", "Open HTTP connections.", self._server.connections)
        yield from _grpc_connections(self._server.grpc_port)
        yield from _gpu_memory()


def _grpc_connections(port: int | None) -> Iterable[Metric]:
    """TCP connections to the gRPC port, whose library does not say; nothing where the kernel has no /proc/net."""
    if port is None:
        return
    ending, open_now = f":{port:04X}", 0
    try:
        for name in ("tcp", "tcp6"):
            rows = (line.split(None, 4) for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:])
            open_now += sum(row[1].endswith(ending) and row[3] == ESTABLISHED for row in rows)
    except OSError:
        return
    yield GaugeMetricFamily("mpdsgr_grpc_connections", "Open gRPC connections.", open_now)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


def _gpu_memory() -> Iterable[Metric]:
    """As the driver tells it, in bytes; nothing where there is no GPU."""
    if which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return
    used = GaugeMetricFamily("mpdsgr_gpu_memory_used_bytes", "GPU memory in use, by all.", labels=("gpu",))
    total = GaugeMetricFamily("mpdsgr_gpu_memory_total_bytes", "GPU memory.", labels=("gpu",))
    for line in lines:
        gpu, *megabytes = (field.strip() for field in line.split(","))
        for family, value in zip((used, total), megabytes, strict=True):
            family.add_metric([gpu], float(value) * 2**20)
    yield from (used, total)
