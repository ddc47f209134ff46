"""What the server costs beyond the network it serves: CPU, memory and time to be ready, and what throughput it leaves.

    python benchmarks/serving.py      writes benchmarks/results/serving.json and the table of benchmarks/README.md

Server and load tool share the machine, over the loopback. CPU: of the server's process during single-image requests of
`mpdsgr bench`, binary, less what the same network takes in this process for batches as large as those the server
formed; of a network so small that the rest is seen. Memory, and time from the start to ready: beyond a process that
does nothing but open the network and compute batches as large. Throughput: of 32-image requests beside this process's
own predictor, on a network of some size. All of it in turns, round after round.
"""

import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
from networks import untrained_bundle
from numpy.typing import NDArray
from processes import holding, serving

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.runtime.tuning import tune
from mpdsgr_deploy.serving import load
from mpdsgr_deploy.serving.load import Load, LoadMeasurement, LoadOutcome

USERS, BATCHES, LARGE = (1, 8, 32), (1, 2, 4, 8, 16, 32), 32
NETWORKS = {"tiny": ("vgg-small", 0.03, 1), "large": ("vgg11", 0.25, 4)}  # model, width, T
GOALS = {"cpu": {"1": 0.28, "8": 0.19, "32": 0.17}, "memory": 90.0, "ready": 1.5, "throughput": 0.95}
PACKAGES = ("grpcio", "httptools", "onnxruntime", "tritonclient", "uvloop")


@click.option("--rounds", default=7, show_default=True, type=click.IntRange(2), help="Of everything.")
@click.option("--seconds", default=4.0, show_default=True, type=click.FloatRange(0.1), help="Of each load.")
def run(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure the server beside the networks that it serves."""
    with tempfile.TemporaryDirectory() as folder:
        tiny, large = (_bundle(name, Path(folder)) for name in NETWORKS)
        samples = measure(tiny, large, rounds, seconds)
    versions = {name: package_version(name) for name in PACKAGES}
    networks = {name: {"model": model, "width": width, "T": T} for name, (model, width, T) in NETWORKS.items()}
    return {"networks": networks, "rounds": samples, "versions": versions}


def measure(tiny: Bundle, large: Bundle, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The samples of every round."""
    with open_predictor(tiny) as tiny_here, open_predictor(large) as large_here:
        contenders = {
            "holding": lambda: _held(tiny.path),
            "server": lambda: _served(tiny, tiny_here, seconds),
            "predictor": lambda: _own_rate(large_here, _images(large, LARGE), seconds),
            "served": lambda: _served_rate(large, seconds),
        }
        samples = harness.take_turns(contenders, rounds, warm_up=0)
    return [
        {"holding": holding, **server, "images_per_second": {"predictor": predictor, "served": served}}
        for holding, server, predictor, served in zip(*samples.values(), strict=True)
    ]


def _served(tiny: Bundle, predictor: Predictor, seconds: float) -> dict[str, Any]:
    """A server's time to be ready, CPU per number of users, and memory, with the network's own CPU per batch."""
    with serving(tiny.path) as server:
        url = f"{server.url}/v2/models/{tiny.path.name}"
        return {
            "ready_seconds": server.started,
            "model_cpu_ms": {str(n): _cpu(predictor, _images(tiny, n)) for n in BATCHES},
            "server": {str(users): _asked(url, users, seconds) for users in USERS},
            "memory": server.memory(),
        }


def _served_rate(large: Bundle, seconds: float) -> float:
    """Images per second of a server."""
    with serving(large.path) as server:
        return _load(f"{server.url}/v2/models/{large.path.name}", 2, seconds, LARGE).images_per_second


def _bundle(name: str, folder: Path) -> Bundle:
    model, width, T = NETWORKS[name]
    values = {
        "data": {"name": "cifar10", "root": str(folder / "none")},
        "model": {"name": model, "width": width},
        "encoding": {"T": T},
    }
    bundle = untrained_bundle(Recipe.model_validate(values), folder / name)
    return tune(DEFAULT_BACKEND, bundle, "fp32")[0]  # as `mpdsgr build` does on the machine that serves


def _held(bundle: Path) -> dict[str, float]:
    with holding(bundle, LARGE) as process:
        return {"ready_seconds": process.started, "memory": process.memory()}


def _images(bundle: Bundle, batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).random((batch, *bundle.manifest.input_shape), np.float32)


def _cpu(predictor: Predictor, images: NDArray[np.float32]) -> float:
    """Milliseconds of CPU of one inference, over a tenth of a second."""
    predictor(images)
    count, started, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() - started < 0.1:
        predictor(images)
        count += 1
    return 1000 * (time.process_time() - cpu) / count


def _asked(url: str, users: int, seconds: float) -> dict[str, float]:
    """CPU of the server a request, and the mean size of the batches that it formed."""
    before = _executions(url)
    outcome = _load(url, users, seconds, 1)
    images, batches = (after - earlier for after, earlier in zip(_executions(url), before, strict=True))
    assert outcome.server_cpu_ms is not None
    return {
        "cpu_ms": outcome.server_cpu_ms,
        "batch": images / batches,
        "requests": outcome.tally.requests,
        "own_cpu_share": outcome.own_cpu / outcome.tally.busy,
    }


def _load(url: str, users: int, seconds: float, batch: int) -> LoadOutcome:
    measurement = LoadMeasurement()
    load.measure(url, [Load(seconds, 10**6, concurrency=users)], measurement, batch=batch)
    (outcome,) = measurement.outcomes
    if outcome.tally.errors:
        raise click.ClickException(f"the server refused some: {dict(outcome.tally.errors)}")
    return outcome


def _executions(url: str) -> tuple[int, int]:
    """Images and batches computed so far."""
    with urllib.request.urlopen(f"{url}/stats") as answer:
        (stats,) = json.load(answer)["model_stats"]
    return stats["inference_count"], stats["execution_count"]


def _own_rate(predictor: Predictor, images: NDArray[np.float32], seconds: float) -> float:
    predictor(images)
    count, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        predictor(images)
        count += len(images)
    return count / (time.monotonic() - started)


def beyond(sample: dict[str, Any], users: str) -> float:
    """CPU in ms a request that is not the model's own at batches of the size that the server formed."""
    asked, model = sample["server"][users], sample["model_cpu_ms"]
    batch = asked["batch"]
    return asked["cpu_ms"] - float(np.interp(batch, BATCHES, [model[str(n)] for n in BATCHES])) / batch


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    rounds, goals, rows = result["rounds"], GOALS["cpu"], []
    for users in map(str, USERS):
        batch = statistics.median(sample["server"][users]["batch"] for sample in rounds)
        what = f"CPU, ms a one-image request, {users} at once (batches of {batch:.1f})"
        rows.append([what, harness.spread([beyond(s, users) for s in rounds]), f"at most {goals[users]}"])
    memory = [(sample["memory"] - sample["holding"]["memory"]) / 1e6 for sample in rounds]
    rows.append(["memory, MB", harness.spread(memory, form="{:.0f}"), f"at most {GOALS['memory']:.0f}"])
    ready = [sample["ready_seconds"] - sample["holding"]["ready_seconds"] for sample in rounds]
    rows.append(["time to be ready, s", harness.spread(ready), f"at most {GOALS['ready']}"])
    served, predictor = ([s["images_per_second"][name] for s in rounds] for name in ("served", "predictor"))
    what = "throughput of 32-image requests, of the predictor's"
    rows.append([what, harness.spread(served, predictor, "{:.0%}"), f"at least {GOALS['throughput']:.0%}"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    tiny, large = result["networks"]["tiny"], result["networks"]["large"]
    return harness.table(
        ["what", f"median [{harness.interval(len(rounds))[1]:.0%} interval]", "goal"],
        rows,
        f"Beyond the network's own, {len(rounds)} rounds; {tiny['model']} on 32x32 images, width {tiny['width']}, "
        f"T = {tiny['T']}, for throughput {large['model']}, width {large['width']}, T = {large['T']}; as `mpdsgr "
        f"build` prepares them; server and load on the same cores. "
        f"{versions}.",
        harness.source(result),
    )


main = harness.command("serving", run, render)

if __name__ == "__main__":
    main()
