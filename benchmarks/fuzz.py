"""Requests changed at random, over HTTP and gRPC: none may be answered with 5xx, or wrong, or not at all.

    python benchmarks/fuzz.py      writes benchmarks/results/fuzz.json and the table of benchmarks/README.md

A valid request is changed in its JSON, its claims, its tensors, its framing, or in any of its bytes (fuzz_cases.py)
and sent to a real server with short times. An answer with 200 must hold the logits that the predictor gives here for
the numbers in that very request. A connection must be answered or closed within PATIENCE seconds. 504 is right where
a request asks for so short a time.
"""

import asyncio
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import grpc.aio
import harness
import numpy as np
import uvloop
from fuzz_cases import MODEL, MOST, Case, case
from processes import Process, serving
from tritonclient.grpc import service_pb2 as pb

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.parity import TOLERANCE
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import package_version, provenance
from mpdsgr_deploy.runtime import open_predictor

BUNDLE = Path(__file__).parent.parent / "export" / "doctor" / "bundle"
PATIENCE = 10.0  # seconds
USERS = 16
LIMITS = {"batch": MOST, "header_seconds": 0.5, "body_seconds": 1}
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}  # of gRPC
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")


class Found:
    """What came of the cases."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.codes: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.examples: list[str] = []
        self.compared, self.largest = 0, 0.0

    def failed(self, what: str, which: Case, told: object) -> None:
        self.wrong[what] += 1
        if self.wrong[what] <= 5:
            self.examples.append(f"{what}: {told!r} to {which.protocol} {which.content[:2000]!r}")

    def compare(self, which: Case, logits: np.ndarray) -> None:
        """Whatever batch the request was computed in: a sum's order may turn a neuron that lies on its threshold."""
        try:
            x = np.ascontiguousarray(which.carried(), np.float32)
            expected = self.predictor(x)
            off = _difference(logits, expected)
            for others in range(1, 2 * MOST) if off > TOLERANCE else ():
                batch = np.concatenate([x, np.zeros((others, *x.shape[1:]), np.float32)])
                off = min(off, _difference(logits, self.predictor(batch)[: len(x)]))
        except Exception as error:  # a request without numbers that make sense, which got logits
            self.failed("accepted", which, error)
            return
        self.compared += 1
        self.largest = max(self.largest, off)
        if not off <= TOLERANCE:
            self.failed("wrong", which, off)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf


@click.option("--cases", default=100_000, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option("--minutes", default=20.0, show_default=True, help="At most.", type=click.FloatRange(0.01, 240))
def measure(cases: int, seed: int, minutes: float) -> dict[str, Any]:
    """Send requests changed at random to a server."""
    result = run(cases, seed, 60 * minutes)
    for example in result["examples"]:
        click.echo(example[:1000], err=True)
    return result


def run(cases: int, seed: int, seconds: float) -> dict[str, Any]:
    """Counts by status, and of what is wrong."""
    settings = [f"--set=limits.{key}={value}" for key, value in LIMITS.items()]
    with open_predictor(open_bundle(BUNDLE)) as predictor, serving(f"{MODEL}={BUNDLE}", *settings) as server:
        found = Found(predictor)
        before = {"memory": server.memory(), "files": server.files()}
        start = time.monotonic()
        uvloop.run(_traffic(server, found, cases, seed, start + seconds))
        took = time.monotonic() - start
        after = {"memory": server.memory(), "files": server.files()}
    versions = ("httptools", "uvloop", "grpcio", "protobuf", "tritonclient", "onnxruntime")
    return {
        "cases": sum(found.codes.values()),
        "seed": seed,
        "seconds": round(took, 1),
        "codes": dict(sorted(found.codes.items())),
        "wrong": {kind: found.wrong[kind] for kind in ("5xx", "hung", "wrong", "accepted")},
        "compared": found.compared,
        "largest_difference": found.largest,
        "before": before,
        "after": after,
        "errors_logged": len(server.errors),
        "exit_code": server.code,
        "examples": found.examples + server.errors[:5],
        "versions": {name: package_version(name) for name in versions},
        "provenance": provenance(),
    }


async def _traffic(server: Process, found: Found, cases: int, seed: int, end: float) -> None:
    numbers = itertools.count()

    def mine() -> Iterator[Case]:
        """The cases that one user sends; each case has a seed of its own, whoever sends it."""
        while (number := next(numbers)) < cases and time.monotonic() < end:
            yield case(random.Random(f"{seed}/{number}"))

    port = int(server.url.rpartition(":")[2])
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        await asyncio.gather(*(_user(mine(), port, channel, found) for _ in range(USERS)))


async def _user(cases: Iterator[Case], port: int, channel: grpc.aio.Channel, found: Found) -> None:
    streams: Streams | None = None
    for which in cases:
        if which.protocol != "http":
            await _call(which, channel, found)
            continue
        if not which.whole:  # what is left of a request must not meet the next
            await _close(streams)
            streams = None
        keep = False
        try:
            async with asyncio.timeout(PATIENCE):
                streams = streams or await asyncio.open_connection("127.0.0.1", port)
                keep = await _ask(which, *streams, found)
        except TimeoutError:
            found.codes["http none"] += 1
            found.failed("hung", which, "")
        if not (keep and which.whole):
            await _close(streams)
            streams = None
    await _close(streams)


async def _close(streams: Streams | None) -> None:
    if streams is not None:
        streams[1].close()
        with suppress(ConnectionError):
            await streams[1].wait_closed()


async def _ask(which: Case, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, found: Found) -> bool:
    """Send it and judge the answer; whether the connection can be used again."""
    try:
        writer.write(which.content)
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        length = LENGTH.search(head)
        bodiless = which.content.startswith(b"HEAD ") or status == 100
        body = b"" if bodiless else await reader.readexactly(int(length[1]) if length else 0)
    except (asyncio.IncompleteReadError, ConnectionError):
        found.codes["http closed"] += 1
        return False
    found.codes[f"http {status}"] += 1
    if status >= 500 and not (status == 504 and which.timed):
        found.failed("5xx", which, body[:300])
    if status == 200 and body.startswith(b'{"model_name"'):
        _judge_json(which, head, body, found)
    return b"connection: close" not in head


def _judge_json(which: Case, head: bytes, body: bytes, found: Found) -> None:
    size = re.search(rb"(?i)inference-header-content-length: (\d+)", head)
    told = json.loads(body[: int(size[1])] if size else body)
    place = int(size[1]) if size else len(body)
    for output in told["outputs"]:
        raw = body[place : place + output.get("parameters", {}).get("binary_data_size", 0)]
        place += len(raw)
        if output["name"] == "logits" and output["datatype"] == "FP32":
            numbers = np.frombuffer(raw, "<f4") if raw else np.array(output["data"], np.float32)
            found.compare(which, numbers.reshape(output["shape"]))


async def _call(which: Case, channel: grpc.aio.Channel, found: Found) -> None:
    method = channel.unary_unary(f"/inference.GRPCInferenceService/{which.protocol}")
    start = time.monotonic()
    try:
        answer = await method(which.content, timeout=PATIENCE)
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        found.codes[f"grpc {code}"] += 1
        if code == "DEADLINE_EXCEEDED" and time.monotonic() - start >= PATIENCE:
            found.failed("hung", which, error.details())
        elif code not in REFUSED and not (code == "DEADLINE_EXCEEDED" and which.timed):
            found.failed("5xx", which, (code, error.details()))
        return
    found.codes["grpc OK"] += 1
    if which.protocol == "ModelInfer":
        told = pb.ModelInferResponse.FromString(answer)
        for output, raw in zip(told.outputs, told.raw_output_contents, strict=True):
            if output.name == "logits" and output.datatype == "FP32":
                found.compare(which, np.frombuffer(raw, "<f4").reshape(tuple(output.shape)))


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its source."""
    wrong, before, after = result["wrong"], result["before"], result["after"]
    rows = {
        "cases": f"{result['cases']:,} in {result['seconds'] / 60:.1f} minutes, seed {result['seed']}",
        **{code: f"{n:,}" for code, n in result["codes"].items()},
        "5xx, INTERNAL, UNKNOWN": wrong["5xx"],
        f"neither answered nor closed in {PATIENCE:g} s": wrong["hung"],
        "accepted without numbers to compute": wrong["accepted"],
        "logits compared": f"{result['compared']:,}; largest difference {result['largest_difference']:.1g}",
        "wrong logits": wrong["wrong"],
        "memory, MB, before and after": f"{before['memory'] / 1e6:.0f}, {after['memory'] / 1e6:.0f}",
        "open files, likewise": f"{before['files']}, {after['files']}",
        "errors in the server's log": result["errors_logged"],
        "exit code after SIGTERM": result["exit_code"],
    }
    lines = ["| what | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*lines, "", harness.source(result), ""])


main = harness.command("fuzz", measure, render)

if __name__ == "__main__":
    main()
