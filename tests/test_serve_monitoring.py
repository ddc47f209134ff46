"""Prometheus, where it is installed, scrapes a real server: each panel has data, each alert can be evaluated."""

import json
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_files import load, monitoring
from served import BUNDLE, INFER, Served, eventually, http, images, request

SERVE = Path(__file__).parent.parent / "serve"
PROMETHEUS = shutil.which("prometheus")
ADDED = {"job", "instance", "process"}  # labels that Prometheus adds to what it scrapes, or several processes
SECONDS = 60.0  # to wait for anything on a busy machine


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key"
    path.write_text(secrets.token_urlsafe(32) + "\n")
    return path


@pytest.fixture(scope="module")
def served(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key and, as the driver's tool tells it, a GPU."""
    tools = tmp_path_factory.mktemp("tools")
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 0, 1024, 81559\n")
    (tools / "nvidia-smi").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tools), prepend=":")
        with Served(BUNDLE, "--api-key-file", key) as server:
            yield server


def traffic(server: Served, key: str) -> list[int]:
    """One request of each kind: answered, refused, late, without a key."""
    told = {"Authorization": f"Bearer {key}"}
    late = request(images(2), parameters={"timeout": 1})
    bodies = [(request(images(3)), told), ({"inputs": []}, told), (late, told), (request(images(1)), {})]
    return [server.ask(http("POST", INFER, body, headers)).status for body, headers in bodies]


def exposed(server: Served, key: str) -> dict[str, set[str]]:
    """The labels of each sample's name."""
    text = server.ask(http("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})).body.decode()
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
    return found


def unknown(expression: str, known: dict[str, set[str]]) -> set[str]:
    """Metrics and labels that an expression asks for and no server has."""
    missing: set[str] = set()
    used = re.findall(r"\b((?:mpdsgr|process)_\w+)(?:\{(.*?)\})?", expression)
    for name, selector in used:
        asked = set(re.findall(r"(\w+)\s*[=!]~?", re.sub(r'".*?"', '""', selector)))
        missing |= {name} - known.keys() or {f"{name}.{label}" for label in asked - known[name] - ADDED}
    labels = ADDED.union(*(known.get(name, set()) for name, _ in used))
    for grouped in re.findall(r"\b(?:by|on|ignoring) \((.*?)\)", expression):
        missing |= set(re.findall(r"\w+", grouped)) - labels
    return missing


def test_every_metric_and_label_exists(served: Served, key: Path) -> None:
    secret = key.read_text().strip()
    assert traffic(served, secret) == [200, 400, 504, 401]
    assert eventually(lambda: "mpdsgr_dropped_total" in exposed(served, secret))  # when its turn came, after its answer
    known = exposed(served, secret)
    for expression in [*monitoring.alerts(SERVE).values(), *monitoring.panel_queries(SERVE)]:
        assert not unknown(expression, known), expression
    asked = " ".join(monitoring.panel_queries(SERVE))
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in known if name.startswith("mpdsgr_")}
    assert not [family for family in families if family not in asked]  # nothing that is measured is hidden
    told = [v["definition"] for v in monitoring.dashboard(SERVE)["templating"]["list"] if v["type"] == "query"]
    assert "label_values(mpdsgr_model_ready, model)" in told


@pytest.mark.parametrize(
    ("expression", "missing"),
    [
        ("rate(mpdsgr_request_total[5m])", {"mpdsgr_request_total"}),
        ('mpdsgr_model_ready{name="a"}', {"mpdsgr_model_ready.name"}),
        ("sum by (gpu) (mpdsgr_model_ready)", {"gpu"}),
        ('sum by (le, model) (mpdsgr_request_seconds_bucket{job="mpdsgr", version!~".+"})', set()),
    ],
)
def test_unknown_metrics_and_labels_are_found(expression: str, missing: set[str]) -> None:
    model = {"model", "version"}
    assert (
        unknown(expression, {"mpdsgr_model_ready": model, "mpdsgr_request_seconds_bucket": {*model, "le"}}) == missing
    )


class Prometheus:
    """A Prometheus with a copy of the configuration, whose target and interval are the test's."""

    def __init__(self, folder: Path, target: str, key: Path) -> None:
        shutil.copytree(SERVE / "monitoring", folder, dirs_exist_ok=True)
        text = (folder / "prometheus.yml").read_text()
        text = text.replace("server:8000", target).replace("15s", "250ms")
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(key, folder / "prometheus-key")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [PROMETHEUS or "", f"--web.listen-address={self._address}"]
        command += [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._opener = build_opener(ProxyHandler({}))

    def get(self, path: str, **parameters: str) -> dict[str, list[dict]]:
        """The data of an answer."""
        with self._opener.open(f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}", timeout=60) as reply:
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[dict]:
        """The series of an instant query."""
        return self.get("query", query=expression)["result"]


@pytest.fixture
def prometheus(served: Served, key: Path, tmp_path: Path) -> Iterator[Prometheus]:
    running = Prometheus(tmp_path / "prometheus", f"127.0.0.1:{served.port}", key)
    try:
        yield running
    finally:
        running.process.terminate()
        running.process.wait(SECONDS)


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus, of Debian's package of that name, is not here")
def test_every_panel_has_data(served: Served, key: Path, prometheus: Prometheus) -> None:
    queries = dict.fromkeys(monitoring.panel_queries(SERVE))
    deadline = time.monotonic() + SECONDS
    while queries:
        assert time.monotonic() < deadline, [*queries]
        traffic(served, key.read_text().strip())
        time.sleep(0.3)
        try:
            queries = {query: None for query in queries if not prometheus.query(query)}
        except OSError:  # not listening yet
            assert prometheus.process.poll() is None
    (up,) = prometheus.query('up{job="mpdsgr"}')
    assert up["value"][1] == "1"
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == monitoring.alerts(SERVE).keys()
    assert not [rule for rule in rules if rule["health"] == "err"]
    assert load(SERVE / "monitoring/prometheus.yml")["scrape_configs"][0]["job_name"] == up["metric"]["job"]
