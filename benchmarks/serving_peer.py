"""`mpdsgr serve` beside NVIDIA Triton: CPU a request and requests per second, for the bundle `digits`.

    python benchmarks/serving_peer.py      writes benchmarks/results/serving_peer.json and the table of README.md

All run the float32 network on onnxruntime with one thread, on the loopback, and take turns: `mpdsgr serve` with one
process, with two, and Triton; the load tool shares their cores. Triton is the binary in the wheel of nvidia-pytriton,
whose Python backend computes a batch of all the requests that it is handed at once; an environment of its own under
runs/ holds it. CPU: of all the processes of a server.
"""

import asyncio
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import harness
import uvloop
from processes import children, serving, stat, tree

from mpdsgr_deploy.runtime.remote import ModelUrl
from mpdsgr_deploy.serving.deploy.triton import write_repository
from mpdsgr_deploy.serving.load.connection import Endpoint
from mpdsgr_deploy.serving.load.loops import Load, Traffic, run
from mpdsgr_deploy.serving.load.target_model import describe
from mpdsgr_deploy.serving.source import choose_models

sys.path.append(str(harness.FOLDER.parent / "tests"))
from triton_server import PYTRITON, environment, tritonserver

BUNDLE = harness.FOLDER.parent / "export" / "bundles" / "digits"
ENVIRONMENTS = harness.FOLDER.parent / "runs" / "triton"
USERS, FORMS, PROCESSES = (1, 8, 32), ("binary", "JSON"), (1, 2)
SERVERS = (*(f"mpdsgr {processes}" for processes in PROCESSES), "triton")
TICKS = os.sysconf("SC_CLK_TCK")
BACKEND = """
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, args):
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        name = self.session.get_inputs()[0].name
        images = [utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
        (logits,) = self.session.run(["logits"], {name: np.concatenate(images)})
        rows = np.split(logits, np.cumsum([len(x) for x in images])[:-1])
        return [utils.InferenceResponse([utils.Tensor("logits", part)]) for part in rows]
"""


@click.option("--rounds", default=7, show_default=True, type=click.IntRange(2), help="Of everything.")
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.1), help="Of each load.")
def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Load the servers in turns."""
    os.environ["OMP_NUM_THREADS"] = "1"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    env = environment(ENVIRONMENTS)
    (env / "backends" / "onnxruntime" / "model.py").write_text(BACKEND)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        repository = Path(folder) / "repository"
        write_repository(choose_models([str(BUNDLE)]), repository)
        ours = [stack.enter_context(serving(BUNDLE, "--processes", processes)) for processes in PROCESSES]
        triton = stack.enter_context(tritonserver(env, repository, Path(folder) / "log"))
        ours_at = [(server.url, server.pid) for server in ours]
        at = dict(zip(SERVERS, [*ours_at, (f"http://{triton.http}", _child("tritonserver"))], strict=True))
        samples = harness.take_turns(
            {
                f"{server}, {form}, {users}": lambda server=server, form=form, users=users: uvloop.run(
                    _load(*at[server], form, users, seconds)
                )
                for form in FORMS
                for users in USERS
                for server in SERVERS
            },
            rounds,
        )
    return {"samples": samples, "nvidia-pytriton": PYTRITON, "load_average": os.getloadavg()[2]}


async def _load(url: str, pid: int, form: str, users: int, seconds: float) -> dict[str, float]:
    """CPU in ms a request of the server's processes, and requests per second, of single-image requests."""
    url = f"{url}/v2/models/{BUNDLE.name}"
    endpoint = Endpoint(ModelUrl.split(url))
    model = replace(await describe(url, endpoint), binary=form == "binary")
    traffic = Traffic(endpoint, model.requests(1, None, 0), lambda answer: model.problem(answer, 1))
    before = sum(map(_cpu_seconds, tree(pid)))
    await run(Load(seconds, 10**6, concurrency=users), traffic, 0)
    await asyncio.sleep(0)
    spent = sum(map(_cpu_seconds, tree(pid))) - before
    if traffic.tally.errors:
        raise click.ClickException(f"{url} refused some: {dict(traffic.tally.errors)}")
    return {
        "cpu_ms": 1000 * spent / traffic.tally.requests,
        "requests_per_second": traffic.tally.in_time / traffic.tally.busy,
    }


def _cpu_seconds(pid: int) -> float:
    return sum(map(int, stat(pid)[11:13])) / TICKS


def _child(name: str) -> int:
    (pid,) = (pid for pid in children(os.getpid()) if Path(f"/proc/{pid}/comm").read_text().strip() == name)
    return pid


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    rows = []
    for form in FORMS:
        for users in USERS:
            *ours, triton = (result["samples"][f"{server}, {form}, {users}"] for server in SERVERS)
            for processes, own in zip(PROCESSES, ours, strict=True):
                cells: list[str] = [form, str(users), str(processes)]
                for what, digits in (("cpu_ms", "{:.2f}"), ("requests_per_second", "{:.0f}")):
                    columns = [[sample[what] for sample in samples] for samples in (own, triton)]
                    cells += [*(harness.spread(values, form=digits) for values in columns), harness.spread(*columns)]
                rows.append(cells)
    count = len(next(iter(result["samples"].values())))
    busy = result["load_average"]
    header = [
        "tensors",
        "users",
        "our processes",
        "CPU, ms a request: mpdsgr",
        "Triton",
        "ratio",
        "requests/s: mpdsgr",
        "Triton",
        "ratio",
    ]
    return harness.table(
        header,
        rows,
        f"Medians of {count} rounds [{harness.interval(count)[1]:.0%} interval]. Triton from nvidia-pytriton "
        f"{result['nvidia-pytriton']}. The machine's load average at the end was {busy:.1f}; above its number of cores "
        f"requests per second mean little. {harness.source(result)}",
    )


main = harness.command("serving_peer", measure, render)

if __name__ == "__main__":
    main()
