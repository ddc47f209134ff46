"""OpenTelemetry spans, where its package is installed and set up (for example by `opentelemetry-instrument`)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from mpdsgr_deploy.serving.model import ServedModel

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None  # type: ignore[assignment]

NOTHING: AbstractContextManager[object] = nullcontext()


def span(headers: Mapping[str, str], model: ServedModel, request_id: str) -> AbstractContextManager[object]:
    """Open a span around an inference, as a child of the caller's if the headers name one (W3C Trace Context)."""
    if trace is None:
        return NOTHING
    # get_tracer answers a real one only once somebody has set up where spans go
    tracer = trace.get_tracer("mpdsgr_deploy")
    if isinstance(tracer, trace.ProxyTracer | trace.NoOpTracer):
        return NOTHING
    attributes = {"model": model.source.name, "version": model.version, "request_id": request_id}
    return tracer.start_as_current_span(
        "infer", context=propagate.extract(headers), kind=trace.SpanKind.SERVER, attributes=attributes
    )
