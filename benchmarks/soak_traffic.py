"""The traffic of soak.py: what a user may do on a connection, good or bad, and what must come of it."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import bad_requests
import click
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.data.images import to_unit
from mpdsgr_deploy.parity import TOLERANCE
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime.inference_protocol import read_output
from mpdsgr_deploy.serving.load.connection import Connection, Endpoint, HttpAnswer, NoAnswer
from mpdsgr_deploy.serving.load.target_model import TargetModel, TensorSpec

BATCHES, MOST = (1, 2, 5), 64
MARGIN = 0.8  # of the time that the server gives: a client that took more may find the connection ended
MIX = {  # of HTTP
    "http binary": 79,
    "http uint8": 5,
    "http json": 4,
    "http margin": 2,
    "late": 1,
    "bad http": 8,
    "left": 1,
}
Ask = Callable[[Connection], Awaitable[None]]
Call = Callable[[], Awaitable[None]]


class Counts:
    """What came of the requests, by kind, and what went wrong, a few of each in words."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.examples: list[str] = []
        self.busy = 0  # refused as a hostile client held all connections
        self.again = 0  # sent again, as the client had left its connection idle for longer than the server allows
        self.largest = 0.0  # difference to the logits here

    def failed(self, what: str, example: str) -> None:
        self.wrong[what] += 1
        if self.wrong[what] <= 5:
            self.examples.append(f"{what}: {example}"[:300])
            click.echo(self.examples[-1], err=True)

    def compared(self, kind: str, found: np.ndarray, expected: np.ndarray) -> None:
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
        self.largest = max(self.largest, difference)
        if not difference <= TOLERANCE:
            self.failed("wrong answer", f"{kind}, off by {difference:g}")


class UserConnection(Connection):
    """A user's connection. header, keep_alive: seconds that the server gives a client for a head, and between requests.

    A load client that is held up for so long finds its connection ended, as any client would, and asks again; that is
    counted. Whatever else a server ends without an answer is a fault.
    """

    def __init__(self, endpoint: Endpoint, counts: Counts, *, header: float, keep_alive: float) -> None:
        super().__init__(endpoint)
        self._counts, self._header, self._keep_alive, self._since = counts, header, keep_alive, 0.0

    async def ask(self, message: bytes) -> HttpAnswer:
        first = await self._once(message)
        if first is None:
            self._counts.again += 1
            first = await self._once(message)
        if first is None:
            raise NoAnswer("connection", "ended twice")
        return first

    async def _once(self, message: bytes) -> HttpAnswer | None:
        """The answer, or None for a connection that the server ended in its right."""
        wire, allowed = self._wire, self._keep_alive
        if wire is None or wire.closed:
            allowed, self._since = self._header, time.monotonic()
            wire = await self.open()
        late = time.monotonic() - self._since > MARGIN * allowed
        self._since = time.monotonic()
        try:
            answer = await wire.ask(message)
        except NoAnswer:
            if late:
                return None
            raise
        return None if late and answer.status == 408 else answer


def sure(predictor: Predictor, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 images whose logits do not depend on their batch: no neuron lies within rounding of its threshold."""
    pixels = np.random.default_rng(0).integers(0, 256, (4 * MOST, *shape), np.uint8)
    images = to_unit(pixels)
    alone = np.concatenate([predictor(images[i : i + 1]) for i in range(len(images))])
    good = np.ones(len(images), bool)
    for batch in range(2, MOST + 1):
        turned = np.roll(images, batch, axis=0)
        logits = np.concatenate([predictor(turned[i : i + batch]) for i in range(0, len(turned), batch)])
        good &= np.abs(np.roll(logits, -batch, axis=0) - alone).max(axis=1) < TOLERANCE / 2
    return pixels[good][: 2 * MOST]


def over_http(model: TargetModel, predictor: Predictor, pixels: np.ndarray, counts: Counts) -> dict[str, list[Ask]]:
    """By kind, what a user may do on a connection."""
    deck: dict[str, list[Ask]] = {kind: [] for kind in MIX}
    (image,) = model.inputs
    forms = {
        "http binary": model,
        "http uint8": replace(model, inputs=(replace(image, datatype="UINT8"),)),
        "http json": replace(model, binary=False),
        "http margin": replace(model, output=TensorSpec("margin", "FP32", ())),
    }
    for kind, form in forms.items():
        for batch in BATCHES:
            for number, message in enumerate(form.requests(batch, pixels, 0)):
                expected = _logits(predictor, pixels, number * batch, batch)
                if kind == "http margin":
                    ordered = np.sort(expected, axis=1)
                    expected = ordered[:, -1] - ordered[:, -2]
                deck[kind].append(asking(kind, form, message, batch, expected, counts))
    for what, message in bad_requests.http(model).items():
        deck["bad http"].append(refused(what, message, counts))
    deck["late"] = [late(bad_requests.late(model), counts)]
    whole = model.requests(1, pixels, 0)[0]
    deck["left"] = [_leaving(whole[:size]) for size in (0, 10, len(whole) // 2, len(whole) - 1, len(whole))]
    return deck


def _logits(predictor: Predictor, pixels: np.ndarray, start: int, batch: int) -> np.ndarray:
    return predictor(to_unit(pixels[np.arange(start, start + batch) % len(pixels)]))


def asking(kind: str, model: TargetModel, message: bytes, batch: int, expected: np.ndarray, counts: Counts) -> Ask:
    """A good request, whose answer is held against the logits expected."""
    exact = expected.astype("<f4").tobytes()

    async def ask(connection: Connection) -> None:
        try:
            answer = await connection.ask(message)
        except NoAnswer as error:
            counts.failed("no answer", f"{kind}: {error}")
            await asyncio.sleep(0.1)
            return
        if is_busy(answer):
            counts.busy += 1
            await asyncio.sleep(0.1)
            return
        if answer.status == 200 and answer.json_size is not None and answer.body[answer.json_size :] == exact:
            return  # nearly always, and cheaper than a comparison of numbers
        if problem := model.problem(answer, batch):
            counts.failed("5xx" if answer.status >= 500 else "refused", f"{kind}: {problem} {answer.body[:200]!r}")
            return
        counts.compared(kind, read_output(answer.body, answer.json_size, model.output.name).floats(), expected)

    return ask


def is_busy(answer: HttpAnswer) -> bool:
    """Whether all connections were taken, as a flood of them makes it."""
    return answer.status == 503 and b"too many connections" in answer.body


def refused(what: str, message: bytes, counts: Counts) -> Ask:
    """A bad request, which must be answered with a status of 4xx."""

    async def ask(connection: Connection) -> None:
        try:
            answer = await connection.ask(message)
        except NoAnswer as error:
            counts.failed("no answer", f"{what}: {error}")
            return
        if is_busy(answer):
            counts.busy += 1
            await asyncio.sleep(0.1)
            return
        if not 400 <= answer.status < 500:
            counts.failed(
                "5xx" if answer.status >= 500 else "accepted", f"{what}: {answer.status} {answer.body[:100]!r}"
            )

    return ask


def late(message: bytes, counts: Counts) -> Ask:
    """A request whose own timeout passes before it is computed, nearly always."""

    async def ask(connection: Connection) -> None:
        try:
            answer = await connection.ask(message)
        except NoAnswer as error:
            counts.failed("no answer", f"late: {error}")
            return
        if answer.status not in (200, 504) and not is_busy(answer):
            counts.failed("5xx", f"late: {answer.status} {answer.body[:100]!r}")

    return ask


def _leaving(part: bytes) -> Ask:
    """Sends a part of a request and hangs up."""

    async def ask(connection: Connection) -> None:
        at = connection.endpoint.at
        _, writer = await asyncio.open_connection(at.host, at.port)
        try:
            writer.write(part)
            await writer.drain()
        finally:
            writer.transport.abort()

    return ask


def over_grpc(
    model: TargetModel, stub: Any, predictor: Predictor, pixels: np.ndarray, counts: Counts
) -> tuple[list[Call], list[Call]]:
    """Calls that are answered, and calls that are refused."""
    (image,) = model.inputs

    def answered(request: Any, expected: np.ndarray) -> Call:
        async def ask() -> None:
            try:
                answer = await stub.ModelInfer(request)
            except grpc.aio.AioRpcError as error:
                counts.failed("5xx", f"grpc: {error.code().name} {error.details()}")
                return
            found = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
            counts.compared("grpc", found, expected)

        return ask

    def turned_away(what: str, request: Any) -> Call:
        async def ask() -> None:
            try:
                await stub.ModelInfer(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
                    counts.failed("5xx", f"grpc, {what}: {error.code().name}")
            else:
                counts.failed("accepted", f"grpc, {what}")

        return ask

    good = []
    for number in range(16):
        for batch in BATCHES:
            images = pixels[np.arange(number, number + batch)]
            request = pb.ModelInferRequest(model_name=model.endpoint.at.path.rpartition("/")[2])
            request.inputs.add(name=image.name, datatype="UINT8", shape=images.shape)
            request.raw_input_contents.append(images.tobytes())
            good.append(answered(request, _logits(predictor, pixels, number, batch)))
    return good, [turned_away(what, request) for what, request in bad_requests.grpc(model)]
