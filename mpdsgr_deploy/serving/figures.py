"""A model's counts in one process, or summed over several, as `/v2/models/stats` and the status page show them."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from mpdsgr_deploy.serving.repository import Entry
from mpdsgr_deploy.serving.served_model import ServedModel
from mpdsgr_deploy.serving.statistics import WINDOW, Histogram, Statistics

ENOUGH = 100  # the number of requests from which on the 99th percentile is shown


class Figures(NamedTuple):
    """A model in one process: its bundle's digest, its counts, and the number of waiting images."""

    digest: str
    statistics: Statistics
    queued: int


def statistics_extension(model: ServedModel, others: Sequence[Figures]) -> dict[str, Any]:
    """Return the model's entry in the statistics extension. others: the figures of the other processes."""
    counts = [model.statistics, *(other.statistics for other in others)]

    def duration(*histograms: Histogram) -> dict[str, int]:
        seconds = sum(histogram.sum for histogram in histograms)
        return {"count": sum(histogram.count for histogram in histograms), "ns": int(seconds * 1e9)}

    batches = sum(one.batch.count for one in counts)
    return {
        "name": model.source.name,
        "version": model.version,
        "last_inference": max(one.last_inference_ms for one in counts),
        "inference_count": sum(one.images for one in counts),
        "execution_count": batches,
        "inference_stats": {
            "success": duration(*(one.request for one in counts)),
            "fail": {"count": sum(one.failed for one in counts), "ns": 0},
            "queue": duration(*(one.queue for one in counts)),
            "compute_input": {"count": batches, "ns": 0},
            "compute_infer": duration(*(one.inference for one in counts)),
            "compute_output": {"count": batches, "ns": 0},
        },
    }


def status(entry: Entry, backend: str, others: Sequence[Figures]) -> dict[str, Any]:
    """Return the JSON data of a model on the status page. others: the figures of the other processes."""
    source, model = entry.source, entry.model
    status: dict[str, Any] = {
        "name": source.name,
        "version": model.version if model else "",
        "state": entry.state,
        "reason": entry.reason,
        "precision": source.precision,
        "backend": backend,
    }
    if model is None:
        return status
    counts, now = [model.statistics, *(other.statistics for other in others)], time.monotonic()
    recent = [_recent(one, now) for one in counts]
    times = sorted(time for one in recent for time in one.milliseconds)
    return {
        **status,
        "input": {"name": model.input.name, "shape": list(model.input.shape)},
        "labels": list(model.labels),
        **model.evidence,
        "firing_rate_layers": list(model.layers),
        "queued_images": model.lane.images + sum(other.queued for other in others),
        "inferences": sum(one.images for one in counts),
        "errors": sum(one.failed for one in counts),
        "recent": {
            "seconds": max(one.span for one in recent),
            "requests_per_second": sum(len(one.milliseconds) / one.span for one in recent if one.span),
            "images_per_second": sum(one.images / one.span for one in recent if one.span),
            "latency_ms": _percentiles(times),
        },
    }


class Recent(NamedTuple):
    """The requests of the last WINDOW seconds.

    span: the seconds that they cover; images: their total number of images; milliseconds: the latency of each.
    """

    span: float
    images: int
    milliseconds: list[float]


def _recent(counts: Statistics, now: float) -> Recent:
    recent = [moment for moment in counts.recent if now - moment.end < WINDOW]
    # if the buffer has no older request, it may not reach back to the beginning of the window
    span = WINDOW if len(recent) < len(counts.recent) else now - min((m.end - m.seconds for m in recent), default=now)
    return Recent(span, sum(m.images for m in recent), [1000 * moment.seconds for moment in recent])


def _percentiles(times: list[float]) -> dict[str, float | None] | None:
    """Return p50 and p99 of sorted times; p99 is None for fewer than ENOUGH times, and all is None without any."""
    if not times:
        return None
    return {"p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)] if len(times) >= ENOUGH else None}
