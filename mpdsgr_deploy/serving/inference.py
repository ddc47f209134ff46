"""Answer one inference request, of HTTP or gRPC, with the tensors of its outputs."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.serving.batcher import Batcher, Outputs
from mpdsgr_deploy.serving.refusals import Refused, Why, invalid
from mpdsgr_deploy.serving.served_model import FIRING_RATE, MARGIN, ServedModel
from mpdsgr_deploy.serving.tensors import InputTensor, best, bytes_tensor, margin

Watch = Callable[[Callable[[], None] | None], None]
MICROSECONDS = 1e-6  # unit of a request's parameter `timeout`


class RequestedOutput(NamedTuple):
    """A requested output. classes: the number of best classes to return as labels; 0: return its numbers."""

    name: str
    binary: bool = False
    classes: int = 0


class InferenceRequest(NamedTuple):
    """An inference request. timeout: in seconds.

    inputs: removed from the list once they are converted, because JSON lists take ten times the memory of arrays.
    """

    id: str
    inputs: list[InputTensor]
    outputs: Sequence[RequestedOutput]
    timeout: float | None
    binary: bool = False  # whether the default output is binary, if the request names no outputs


class OutputAnswer(NamedTuple):
    """The answer for one output: its numbers float32 [B, ...], or its labels [B][k]."""

    requested: RequestedOutput
    content: NDArray[np.float32] | list[list[str]]

    @property
    def shape(self) -> list[int]:
        if isinstance(self.content, list):
            return [len(self.content), len(self.content[0])]
        return list(self.content.shape)

    @property
    def datatype(self) -> str:
        return "BYTES" if isinstance(self.content, list) else "FP32"

    def raw(self) -> bytes:
        """Return the content in the binary form that both protocols use."""
        if isinstance(self.content, list):
            return bytes_tensor(self.content)
        return np.ascontiguousarray(self.content, "<f4").tobytes()


async def infer(
    model: ServedModel,
    batcher: Batcher,
    request: InferenceRequest,
    seconds: float,
    watch: Watch | None = None,
) -> list[OutputAnswer]:
    """Answer a request within `seconds` from now, or within its own timeout if that is shorter.

    watch: registers a function to call when the client disconnects, which drops the request. Raises Refused for a
    request that does not fit the model, comes while the queue is full, is late, or whose client disconnects.
    """
    start = time.monotonic()
    if len(request.inputs) != 1:
        raise invalid(f"a request must have one input, {model.input.name!r}; this one has {len(request.inputs)}")
    outputs = request.outputs or [RequestedOutput(model.output, request.binary)]
    for requested in outputs:
        model.require_output(requested.name, requested.classes)
    if len({requested.name for requested in outputs}) != len(outputs):
        raise invalid("an output is requested twice")
    images = model.input.images(request.inputs.pop())
    rates = any(requested.name == FIRING_RATE for requested in outputs)
    limit = seconds if request.timeout is None else min(seconds, request.timeout)
    future = batcher.submit(model.lane, images, start + limit, rates=rates)
    computed = await _watched(future, limit if request.timeout is not None else None, watch)
    model.statistics.answered(time.monotonic() - start, len(images))
    return [OutputAnswer(requested, _content(model, requested, computed)) for requested in outputs]


async def _watched(
    future: "asyncio.Future[Outputs]",
    seconds: float | None,
    watch: Watch | None,
) -> Outputs:
    """Return the future's result. Raises Refused if `seconds` pass (None: no limit) or the client leaves before."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, _late, future)
    has_left = False

    def leave() -> None:
        nonlocal has_left
        has_left = True
        future.cancel()

    if watch is not None:
        watch(leave)
    try:
        return await future
    except asyncio.CancelledError:
        if has_left:
            raise Refused(Why.CANCELLED, "the client disconnected") from None
        future.cancel()
        raise
    finally:
        if timer is not None:
            timer.cancel()
        if watch is not None:
            watch(None)


def _late(future: "asyncio.Future[Outputs]") -> None:
    if not future.done():
        future.set_exception(Refused(Why.LATE, "the request's timeout passed before it was answered"))


def _content(
    model: ServedModel, requested: RequestedOutput, computed: Outputs
) -> NDArray[np.float32] | list[list[str]]:
    if requested.classes:
        return best(computed.logits, model.labels, min(requested.classes, len(model.labels)))
    if requested.name == MARGIN:
        return margin(computed.logits)
    if requested.name == FIRING_RATE:
        assert computed.rates is not None  # for the type checker: they were requested
        return computed.rates
    return computed.logits
