"""A Ray cluster of two nodes on this machine; a mark tells what it started, and nothing else is ended."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.request import Request, urlopen

import pytest
import yaml
from click.testing import CliRunner
from ports import free_ports

MARK = "MPDSGR_TEST_CLUSTER"
# Said aloud, since the first node of a cluster otherwise asks for the token that any earlier ray.init() left in the
# user's home, and the second node does not send it.
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
# The system ends a node, and the node what it started, when this process dies without an end: after a test that hangs
START = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
from ray.scripts.scripts import main
main()
"""
NODE = [
    "--block",
    "--node-ip-address=127.0.0.2",  # Ray would replace 127.0.0.1 with an address that others reach
    "--num-cpus=1",
    "--num-gpus=0",
    "--object-store-memory=80000000",
    "--min-worker-port=0",
    "--max-worker-port=0",
    "--disable-usage-stats",
    "--include-log-monitor=false",  # no driver shows the logs of workers
]


def until(condition: Callable[[], Any], what: str, seconds: float = 120, every: float = 0.02) -> Any:
    """What the condition gives once that is true. Raises AssertionError if it takes longer.

    every: seconds between two tries; Ray's dashboard works for a tenth of a second on each question.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError):
            if found := condition():
                return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {what}")


class Cluster:
    """Two nodes with a CPU each, for the length of a with block. http: the ports of their proxies."""

    def __init__(self) -> None:
        pytest.importorskip("ray")
        self.http = free_ports(2)
        self._gcs, self._dashboard, self._client, *self._agents = free_ports(5)
        self._mark = secrets.token_hex(8)
        self._place = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets lie in it: a short path
        self._nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        first = [f"--port={self._gcs}", f"--ray-client-server-port={self._client}", f"--temp-dir={self._place}/ray"]
        first.append("--no-monitor")  # no node comes by itself
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}"]
        try:
            self._start(0, "--head", *first, *dashboard)
            until(lambda: socket.create_connection(("127.0.0.2", self._gcs)).close() is None, "the first node")
            self._start(1, f"--address=127.0.0.2:{self._gcs}")
            until(lambda: self._nodes_alive() == 2, "the second node", every=0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, number: int, *arguments: str) -> None:
        fallback, stats, metrics = free_ports(3)
        haproxy = self._place / str(number)
        environment = {
            MARK: self._mark,
            **NO_TOKEN,
            "OMP_NUM_THREADS": "1",
            "RAY_prestart_worker_first_driver": "0",  # a process per CPU that nothing would use
            "RAY_worker_niceness": "0",  # not 15, at which replicas wait for all other work of a busy machine
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # not 30
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # not 3
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",  # not 0.1: the processor time of a third of the looks
            "REPORTER_UPDATE_INTERVAL_MS": "60000",  # not 5000: nobody reads what a node's agent measures
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # not 5: the machine may be busy
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.http[1]),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{haproxy}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{haproxy}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{haproxy}/state",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{haproxy}/metrics.sock",
        }
        command = [sys.executable, "-c", START, "start", *NODE, *arguments]
        command.append(f"--dashboard-agent-listen-port={self._agents[number]}")
        with (self._place / f"node{number}.log").open("wb") as log:
            environment = {**os.environ, **environment}
            node = subprocess.Popen(command, env=environment, cwd=self._place, stdout=log, stderr=log)
        self._nodes.append(node)

    def serve(self, *arguments: object) -> None:
        """The command `serve`, which must succeed; in this process, since it takes seconds to import."""
        from ray.serve.scripts import cli

        command = [*map(str, arguments), "--address", f"http://127.0.0.1:{self._dashboard}"]
        for _ in range(3):  # on a busy machine Ray gives up a proxy before it has started, and is to be asked again
            done = CliRunner().invoke(cli, command, env=NO_TOKEN)
            if done.exit_code == 0:
                break
            time.sleep(5)
        assert done.exit_code == 0, (done.output, done.exception)

    def deploy(self, config: Path) -> None:
        """What `serve deploy` asks of a cluster that serves."""
        self._applications("PUT", json.dumps(yaml.safe_load(config.read_text())).encode())

    def shutdown(self) -> None:
        """What `serve shutdown` asks."""
        self._applications("DELETE")

    def _applications(self, method: str, body: bytes | None = None) -> None:
        address = f"http://127.0.0.1:{self._dashboard}/api/serve/applications/"
        request = Request(address, body, {"content-type": "application/json"}, method=method)
        with urlopen(request, timeout=120) as answer:
            assert answer.status == 200

    def _nodes_alive(self) -> int:
        with urlopen(f"http://127.0.0.1:{self._dashboard}/api/v0/nodes", timeout=60) as answer:
            return sum(node["state"] == "ALIVE" for node in json.load(answer)["data"]["result"]["result"])

    def application(self) -> dict[str, Any]:
        """The one that is deployed, as Ray tells."""
        with urlopen(f"http://127.0.0.1:{self._dashboard}/api/serve/applications/", timeout=60) as answer:
            (application,) = json.load(answer)["applications"].values()
        return application

    def replicas(self) -> dict[int, str]:
        """Process to node, of those that run."""
        (deployment,) = self.application()["deployments"].values()
        return {r["pid"]: r["node_id"] for r in deployment["replicas"] if r["state"] == "RUNNING"}

    def processes(self) -> dict[int, str]:
        """All that the cluster has running, with their commands."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"{MARK}={self._mark}".encode() in (process / "environ").read_bytes():
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found[int(process.name)] = command
        return found

    def stop(self) -> None:
        """End both nodes as a user would."""
        for node in self._nodes:
            node.terminate()
        for node in self._nodes:
            node.wait(60)

    def __exit__(self, *exception: object) -> None:
        if any(exception):
            for log in sorted(self._place.glob("ray/session_latest/logs/serve/*.log")):
                print(f"--- {log.name}", log.read_text()[-4000:], sep="\n")
        for pid in self.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for node in self._nodes:
            node.wait(60)
        shutil.rmtree(self._place, ignore_errors=True)
