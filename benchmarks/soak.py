"""Half an hour of good and bad traffic on a server: no wrong answer, no 5xx, and nothing that grows.

    python benchmarks/soak.py      writes benchmarks/results/soak.json and the table of benchmarks/README.md

HTTP with binary tensors and with JSON, and gRPC, from one event loop. One request in ten is bad: one of the table in
bad_requests.py, or a client that leaves in the middle. Every good answer is held against the logits of a predictor in
this process, within what float32 rounding may do. Four hostile clients besides (soak_hostile.py) send slowly, by half,
too much, empty entries, read nothing, say nothing, or take all connections; the server must end each in its time.
Probes of liveness are answered all the while, other versions of the bundle take over, and memory and open files of the
server are read. At the end it is stopped under load.
"""

import asyncio
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import grpc.aio
import harness
import numpy as np
import uvloop
from networks import untrained_bundle
from processes import Process, serving
from soak_hostile import LIMITS, SECONDS, Attack, GrpcAttacks, HttpAttacks
from soak_traffic import MIX, Call, Counts, UserConnection, over_grpc, over_http, sure
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings, prepared
from mpdsgr_deploy.runtime.remote import ModelUrl
from mpdsgr_deploy.serving.load.connection import Connection, Endpoint, NoAnswer
from mpdsgr_deploy.serving.load.target_model import describe
from mpdsgr_deploy.serving.served_model import VERSION_DIGITS

HTTP_USERS, GRPC_USERS = 12, 2
PAUSE = 0.2  # seconds between two attacks of one attacker
BAD_CALLS = 8  # one gRPC call in so many
BURSTS, BURST = 500, 200  # one gRPC call in so many is that many good ones at once
AGAIN = "sent again, as the load client had left a connection idle for longer than allowed"
SAMPLES = 120  # of memory and files
RELOAD_EVERY, RELOAD_PATIENCE = 20.0, 15.0  # seconds between two versions, and until one has to answer


@click.option("--minutes", default=30.0, show_default=True, type=click.FloatRange(0.05, 240))
@click.option("--requests", default=20_000_000, show_default=True, type=click.IntRange(1), help="At most.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Of the server.")
def measure(minutes: float, requests: int, processes: int) -> dict[str, Any]:
    """Send good and bad traffic to a server."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"data": {"name": "cifar10", "root": f"{folder}/none"}, "model": {"name": "vgg-small", "width": 0.03}}
        network = Recipe.model_validate({**values, "encoding": {"T": 1}})
        return run(untrained_bundle(network, Path(folder) / "net"), 60 * minutes, requests, processes)


def run(bundle: Bundle, seconds: float, requests: int, processes: int = 1) -> dict[str, Any]:
    """Counts, and samples of the server's memory and files. The server has a copy of the bundle, which changes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_predictor(bundle) as predictor,
        serving(
            shutil.copytree(bundle.path, Path(folder) / bundle.path.name), "--processes", processes, limits=LIMITS
        ) as server,
    ):
        pixels, counts = sure(predictor, bundle.manifest.input_shape), Counts()
        copy = open_bundle(Path(folder) / bundle.path.name)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            url = f"{server.url}/v2/models/{bundle.path.name}"
            result = runner.run(_soak(server, copy, url, predictor, pixels, seconds, requests, counts))
            in_flight = _gauge(server, "mpdsgr_in_flight_bytes")
            runner.run(_stop(server, url, pixels, counts))
    ended = {"in_flight_bytes": in_flight, "exit_code": server.code, "logged_errors": server.errors}
    wrong = {"wrong": dict(counts.wrong), "examples": counts.examples}
    return {
        **result,
        "processes": processes,
        "requests": dict(counts.kinds),
        **wrong,
        **ended,
        "provenance": provenance(),
    }


async def _soak(
    server: Process,
    bundle: Bundle,
    url: str,
    predictor: Predictor,
    pixels: np.ndarray,
    seconds: float,
    most: int,
    counts: Counts,
) -> dict[str, Any]:
    model = await describe(url, Endpoint(ModelUrl.split(url)))
    samples: list[list[float]] = []
    deck = over_http(model, predictor, pixels, counts)
    started = time.monotonic()
    stop = started + seconds

    async def user(number: int) -> None:
        header, keep_alive = SECONDS["header"], SECONDS["keep_alive"]
        connection = UserConnection(model.endpoint, counts, header=header, keep_alive=keep_alive)
        draw = random.Random(number)
        kinds = draw.choices(list(MIX), weights=list(MIX.values()), k=5000)
        for kind in itertools.cycle(kinds):
            if time.monotonic() >= stop or counts.kinds.total() >= most:
                break
            counts.kinds[kind] += 1
            await draw.choice(deck[kind])(connection)
        connection.close()

    async def caller(number: int, stub: Any, calls: list[Call], bad: list[Call]) -> None:
        draw = random.Random(-1 - number)
        while time.monotonic() < stop and counts.kinds.total() < most:
            if draw.randrange(BURSTS) == 0:
                counts.kinds["grpc in a burst"] += BURST
                await asyncio.gather(*(draw.choice(calls)() for _ in range(BURST)))
            wrong = draw.randrange(BAD_CALLS) == 0
            counts.kinds["bad grpc" if wrong else "grpc"] += 1
            await draw.choice(bad if wrong else calls)()

    async def watch() -> None:
        while True:
            await asyncio.sleep(seconds / SAMPLES)
            now = round(time.monotonic() - started, 2)
            samples.append([now, counts.kinds.total(), server.memory(), server.files()])
            if len(samples) % (SAMPLES // 10) == 0:
                click.echo(f"{now:.0f} s: {counts.kinds.total()} requests, {dict(counts.wrong)} wrong", err=True)

    async def attacker(number: int, attacks: dict[str, Attack]) -> None:
        draw = random.Random(-100 - number)
        while time.monotonic() < stop and counts.kinds.total() < most:
            name = draw.choice(list(attacks))
            counts.kinds[f"hostile: {name}"] += 1
            await attacks[name]()
            await asyncio.sleep(PAUSE)

    where = model.endpoint.at.host, model.endpoint.at.port
    http = HttpAttacks(*where, model.requests(1, pixels, 0)[0], counts, server.clock)
    beside = [asyncio.create_task(watch()), asyncio.create_task(http.probe())]
    beside.append(asyncio.create_task(_reloads(server, bundle, url, counts)))
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        good, bad = over_grpc(model, stub, predictor, pixels, counts)
        async with asyncio.TaskGroup() as group:
            for number in range(HTTP_USERS):
                group.create_task(user(number))
            for number in range(GRPC_USERS):
                group.create_task(caller(number, stub, good, bad))
            calls = GrpcAttacks(int(server.grpc.rpartition(":")[2]), counts, server.clock)
            for number, attacks in enumerate([http.all(), http.all(), calls.all(), calls.all()]):
                group.create_task(attacker(number, attacks))
    for task in beside:
        task.cancel()
    return {
        "seconds": round(time.monotonic() - started, 1),
        "busy": counts.busy,
        "again": counts.again,
        "largest_difference": counts.largest,
        "samples": samples,
    }


async def _reloads(server: Process, bundle: Bundle, url: str, counts: Counts) -> None:
    """Another version of the bundle, with the same network, time after time; each has to take over."""
    for number in itertools.count(1):
        await asyncio.sleep(1 if number == 1 else RELOAD_EVERY)
        # settings of a backend that this server does not use
        settings = prepared(bundle, "openvino", "fp32", RuntimeSettings(threads=number))
        version = (await asyncio.to_thread(bundle.add, settings)).manifest.digest[:VERSION_DIGITS]
        os.kill(server.pid, signal.SIGHUP)
        connection, end = Connection(Endpoint(ModelUrl.split(url))), time.monotonic() + RELOAD_PATIENCE
        message = connection.endpoint.message("GET", connection.endpoint.at.path, headers={"Connection": "close"})
        while time.monotonic() < end:
            await asyncio.sleep(0.2)
            with suppress(NoAnswer):
                if version.encode() in (await connection.ask(message)).body:
                    counts.kinds["reload"] += 1
                    break
        else:
            counts.failed("hostile", f"version {version} did not take over")


async def _stop(server: Process, url: str, pixels: np.ndarray, counts: Counts) -> None:
    """SIGTERM under load: whoever got a connection gets an answer, until no more are accepted."""
    endpoint = Endpoint(ModelUrl.split(url))
    message = (await describe(url, endpoint)).requests(1, pixels, 0)[0]

    async def user() -> None:
        connection = Connection(endpoint)
        while True:
            try:
                wire = await connection.open()
            except NoAnswer:
                return
            try:
                while not wire.closed:
                    await wire.ask(message)
                    counts.kinds["while it stops"] += 1
            except NoAnswer as error:
                counts.failed("no answer", f"at the stop: {error}")

    async with asyncio.TaskGroup() as users:
        for _ in range(HTTP_USERS):
            users.create_task(user())
        await asyncio.sleep(0.3)
        os.kill(server.pid, signal.SIGTERM)


def _gauge(server: Process, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as page:
        return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)", page.read().decode(), re.MULTILINE)))


def by_tenths(samples: list[list[float]], column: int) -> list[float]:
    """Medians of each tenth of the time; of fewer than ten samples, these."""
    values, parts = [sample[column] for sample in samples], min(10, len(samples))
    bounds = [len(values) * i // parts for i in range(parts + 1)]
    return [statistics.median(values[start:end]) for start, end in itertools.pairwise(bounds)]


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    kinds, samples = result["requests"], result["samples"]
    total = sum(kinds.values())
    memory, files = by_tenths(samples, 2), by_tenths(samples, 3)
    wrong = result["wrong"]
    largest = f"largest difference of a logit {result['largest_difference']:.2g}"
    rows = {
        "requests": f"{total:,} in {result['seconds'] / 60:.1f} minutes",
        "processes of the server": result.get("processes", 1),
        **{kind: f"{count:,}" for kind, count in sorted(kinds.items())},
        "wrong answers": f"{wrong.get('wrong answer', 0)}; {largest}",
        "5xx": wrong.get("5xx", 0),
        "good ones refused, or unanswered": wrong.get("refused", 0) + wrong.get("no answer", 0),
        "503s while a client takes all connections": f"{result.get('busy', 0):,}",
        **({AGAIN: result["again"]} if "again" in result else {}),
        "hostile clients that met no bound": wrong.get("hostile", 0),
        "bad ones accepted": wrong.get("accepted", 0),
        "memory, MB, median of each tenth of the time": ", ".join(f"{size / 1e6:.0f}" for size in memory),
        "open files, likewise": ", ".join(f"{count:.0f}" for count in files),
        "bytes of requests still counted at the end": f"{result['in_flight_bytes']:.0f}",
        "exit code after SIGTERM": result["exit_code"],
    }
    lines = ["| what | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())]
    return "\n".join([*lines, "", harness.source(result), ""])


main = harness.command("soak", measure, render)

if __name__ == "__main__":
    main()
