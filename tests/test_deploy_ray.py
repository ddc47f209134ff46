"""A Ray Serve config fits Ray's schema, and a real cluster of two nodes serves by it when a replica is killed."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from functools import partial
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
import yaml
from conftest import assert_input_error, mpdsgr_here, perturbed
from ray_cluster import Cluster, until
from served import BUNDLE

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.serving.deploy.ray import Arguments

# what ray 2.60 uses of pydantic is on its way out
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
CLIENTS = 6
PAUSE = 0.25  # seconds between requests of a client, where it takes Ray a while to notice something
ask_until = partial(until, every=0.5)
KEY = "a-key-of-more-than-sixteen-characters"


def deploy(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return mpdsgr_here("deploy", "ray", *arguments, "--out", out)


def config(out: Path, *arguments: object) -> Any:
    """What the command writes, read as Ray reads it."""
    from ray.serve.schema import ServeDeploySchema

    done = deploy(out, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"serve deploy {out / 'serve.yaml'}\n")
    return ServeDeploySchema.model_validate(yaml.safe_load((out / "serve.yaml").read_text()))


def test_a_config_carries_scale_devices_and_limits(tmp_path: Path) -> None:
    limits = ("--set", "limits.batch=32", "--set", "limits.drain_seconds=100", "--set", "limits.connections=50")
    written = config(tmp_path / "out", BUNDLE, f"{BUNDLE}@int8", "--replicas", "2,8", "--gpu", "0.5", *limits)
    (application,) = written.applications
    (server,) = application.deployments
    assert written.controller_options.runtime_env["env_vars"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    scaling = server.autoscaling_config
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 8, 32)
    assert server.ray_actor_options.num_gpus == 0.5
    assert server.max_ongoing_requests == 50
    assert server.graceful_shutdown_timeout_s > 100
    settings = application.args["settings"]["limits"]
    assert written.http_options.request_timeout_s > settings["body_seconds"] + settings["request_seconds"]
    assert application.args["backend"] == "onnxruntime-cuda"
    names = [network["name"] for network in application.args["networks"]]
    assert names == ["bundle", "bundle-int8"]


def test_a_fixed_number_of_replicas_is_not_scaled(tmp_path: Path) -> None:
    (application,) = config(tmp_path / "out", BUNDLE, "--replicas", "3").applications
    (server,) = application.deployments
    assert (server.num_replicas, application.args["backend"]) == (3, "onnxruntime-cpu")


def test_the_readme_writes_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "serve" / "ray" / "README.md").read_text()
    (line,) = re.findall(r"^    mpdsgr (deploy ray .*)", readme, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLE, "bundles/digits")
    Path("keys.txt").write_text(KEY)
    done = mpdsgr_here(*line.split())
    assert done.returncode == 0, done.stderr
    (application,) = yaml.safe_load(Path("ray/serve.yaml").read_text())["applications"]
    (network,) = application["args"]["networks"]
    assert (network["bundle"], application["args"]["api_key_file"]) == (  # as every node needs them
        str(tmp_path / "bundles" / "digits"),
        str(tmp_path / "keys.txt"),
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--replicas", "4,2"], "4,2"),
        (["--replicas", "0"], "0"),
        (["--replicas", "many"], "many"),
        (["--gpu", "1.5"], "1.5"),
        (["--backend", "abacus"], "abacus"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "missing"], "missing"),
        (["--set", "limits.batch=0"], "batch"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], told: str, tmp_path: Path) -> None:
    assert_input_error(deploy(tmp_path / "out", BUNDLE, *arguments), told)
    assert not (tmp_path / "out").exists()


def test_a_replica_takes_no_other_bundle_than_was_deployed(tmp_path: Path) -> None:
    from mpdsgr_deploy.serving.ray_app import started

    place = shutil.copytree(BUNDLE, tmp_path / "digits")
    (application,) = config(tmp_path / "out", place).applications
    arguments = Arguments.model_validate(application.args)
    server = asyncio.run(started(arguments))
    assert server.ready
    perturbed(open_bundle(BUNDLE), tmp_path / "other")
    shutil.rmtree(place)
    (tmp_path / "other").rename(place)
    with pytest.raises(InputError, match="not the bundle that was deployed"):
        asyncio.run(started(arguments))


class Load:
    """Clients that each ask for one image's logits after another, until the end of a with block.

    pause: seconds between two requests of a client; may be changed at any time.
    """

    def __init__(self, ports: list[int], images: np.ndarray, logits: np.ndarray, pause: float = 0.0) -> None:
        self.outcomes: Counter[str] = Counter()
        self.pause = pause
        self._images, self._logits, self._end = images, logits, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(ports[i % 2], i)) for i in range(CLIENTS)]

    def _ask(self, port: int, number: int) -> None:
        while not self._end.is_set():
            with client(port) as asking:
                try:
                    while not self._end.is_set():
                        number = (number + 1) % len(self._images)
                        got = logits(asking, self._images[number : number + 1])
                        right = np.allclose(got, self._logits[number : number + 1], rtol=0, atol=1e-5)
                        self.outcomes["right" if right else "wrong"] += 1
                        self._end.wait(self.pause)
                except Exception as error:
                    self.outcomes[f"failed: {type(error).__name__} {error}"] += 1

    @property
    def failed(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("failed"))

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)


def client(port: int) -> tritonclient.http.InferenceServerClient:
    return tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")


def logits(asking: tritonclient.http.InferenceServerClient, x: np.ndarray) -> np.ndarray:
    tensor = tritonclient.http.InferInput("images", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return asking.infer("digits", [tensor], headers={"authorization": f"Bearer {KEY}"}).as_numpy("logits")


def get(port: int, path: str, **headers: str) -> tuple[int, list[str], str]:
    """Status, request ids, body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers.get_all("x-request-id", []), body


def test_a_cluster_serves_through_a_killed_replica_and_a_bad_bundle(tmp_path: Path) -> None:
    for place in ("good", "bad"):
        shutil.copytree(BUNDLE, tmp_path / place / "digits")
    (tmp_path / "keys").write_text(KEY)
    with Cluster() as cluster:
        told = ("--replicas", 2, "--port", cluster.http[0], "--api-key-file", tmp_path / "keys")
        for place in ("good", "bad"):
            assert deploy(tmp_path / f"{place}-out", tmp_path / place / "digits", *told).returncode == 0
        good, bad = (tmp_path / f"{place}-out" / "serve.yaml" for place in ("good", "bad"))
        cluster.serve("deploy", good)
        serves_on_both_nodes(cluster)
        loses_nothing_but_what_a_killed_replica_held(cluster)
        refuses_a_bad_bundle(cluster, bad, tmp_path / "bad" / "digits" / "model.fp32.onnx")
        cluster.shutdown()
        cluster.stop()
        ask_until(lambda: not cluster.processes(), "the end of every process")


def expected() -> tuple[np.ndarray, np.ndarray]:
    """Images and the logits of the predictor in this process."""
    bundle = open_bundle(BUNDLE)
    x = bundle.golden()[0]
    with open_predictor(bundle) as predictor:
        return x, predictor(x)


def serves_on_both_nodes(cluster: Cluster) -> None:
    ask_until(lambda: cluster.application()["status"] == "RUNNING", "the application")
    replicas = ask_until(lambda: len(cluster.replicas()) == 2 and cluster.replicas(), "two replicas")
    assert len(set(replicas.values())) == 2
    x, wanted = expected()
    for port in cluster.http:
        ask_until(lambda port=port: get(port, "/v2/health/ready")[0] == 200, "a proxy on each node")
        status, ids, _ = get(port, "/v2/models/digits", x_request_id="mine", authorization=f"Bearer {KEY}")
        assert (status, ids) == (200, ["mine"])
        assert get(port, "/v2/models/digits")[0] == 401
        assert get(port, "/v2/models/none", authorization=f"Bearer {KEY}")[0] == 404
        with client(port) as asking:
            np.testing.assert_allclose(logits(asking, x), wanted, rtol=0, atol=1e-5)
    ask_until(lambda: several_answer(cluster.http[0]), "answers of both replicas")


def several_answer(port: int) -> bool:
    """Whether more than one replica answers: one alone counts every request, so what it tells can only rise."""
    counts = [requests_counted(port) for _ in range(10)]
    return any(later <= earlier for earlier, later in pairwise(counts))


def requests_counted(port: int) -> float:
    """All the requests that the replica which answers has counted, by its own metrics."""
    text = get(port, "/metrics", authorization=f"Bearer {KEY}")[2]
    return sum(map(float, re.findall(r"^mpdsgr_requests_total\{.*\} (.*)", text, re.MULTILINE)))


def loses_nothing_but_what_a_killed_replica_held(cluster: Cluster) -> None:
    before = cluster.replicas()
    victim = min(before)
    with Load(cluster.http, *expected()) as load:
        until(lambda: load.outcomes["right"] > 200, "answers")
        os.kill(victim, signal.SIGKILL)
        load.pause = PAUSE
        ask_until(lambda: len(cluster.replicas().keys() - {victim}) == 2, "another replica")
        answered = load.outcomes["right"]
        until(lambda: load.outcomes["right"] > answered + 50, "answers by both")
    assert load.outcomes["wrong"] == 0, load.outcomes
    # the other one is asked anew; what is lost without that is all that it held, half of the clients' requests
    assert load.failed <= 1, load.outcomes


def refuses_a_bad_bundle(cluster: Cluster, config: Path, network: Path) -> None:
    network.write_bytes(network.read_bytes()[:-1])
    with Load(cluster.http, *expected(), pause=PAUSE) as load:
        cluster.deploy(config)
        ask_until(lambda: cluster.application()["status"] == "DEPLOY_FAILED", "the end of the attempt")
    (deployment,) = cluster.application()["deployments"].values()
    assert f"InputError: {network} does not match its hash" in deployment["message"]
    assert len(cluster.replicas()) == 1  # of the good bundle
    assert set(load.outcomes) == {"right"}, load.outcomes
