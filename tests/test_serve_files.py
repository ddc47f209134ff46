"""The deployment files of `serve/`: each check holds of them, and is seen to fail where it should."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from serve_files import PROMTOOL, docker, kubernetes, load, monitoring

from mpdsgr_deploy.serving.refusals import Why

ROOT = Path(__file__).parent.parent
Check = Callable[[Path], None]
CHECKS: list[Check] = [
    docker.settings_are_the_defaults,
    docker.dockerfile_lints,
    docker.image_is_small_and_unprivileged,
    docker.compose_follows_its_schema,
    docker.compose_is_locked_down,
    docker.gpu_changes_only_what_it_must,
    docker.options_exist,
    monitoring.prometheus_finds_the_server,
    kubernetes.kubernetes_validates,
    kubernetes.pod_is_restricted,
    kubernetes.manifests_fit_each_other,
    kubernetes.pod_monitor_finds_the_pods,
]
WITH_PROMTOOL: list[Check] = [
    monitoring.prometheus_reads_its_files,
    monitoring.rules_lint,
    monitoring.rules_pass_their_tests,
    monitoring.dashboard_is_whole,
]
DOCKERFILE, COMPOSE, GPU = "docker/Dockerfile", "docker/compose.yaml", "docker/compose.gpu.yaml"
PROMETHEUS, ALERTS, ALERTS_TEST = (f"monitoring/{name}.yml" for name in ("prometheus", "alerts", "alerts_test"))
DASHBOARD, CPU = "monitoring/grafana/dashboards/mpdsgr.json", "kubernetes/cpu"
DEPLOYMENT, SERVICE = f"{CPU}/deployment.yaml", f"{CPU}/service.yaml"
# check, file, what is written there, what takes its place
FAULTS: list[tuple[Check, str, str, str]] = [
    (docker.settings_are_the_defaults, "settings.toml", "queue = 1024", "queue = 1025"),
    (docker.settings_are_the_defaults, "settings.toml", "drain_seconds = 30.0", "# drain_seconds = 30.0"),
    (docker.settings_are_the_defaults, "settings.toml", "batch = 64 ", "images = 64 "),
    (docker.dockerfile_lints, DOCKERFILE, "FROM ${PYTHON} AS build", "FROM python:latest AS build"),
    (docker.dockerfile_lints, DOCKERFILE, "USER 10001:10001", "USER root"),
    (docker.dockerfile_lints, DOCKERFILE, '["mpdsgr", "serve", "--host", "0.0.0.0"]', "mpdsgr serve"),
    (docker.image_is_small_and_unprivileged, DOCKERFILE, "USER 10001:10001", "USER mpdsgr"),
    (docker.image_is_small_and_unprivileged, DOCKERFILE, "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL"),
    (docker.image_is_small_and_unprivileged, DOCKERFILE, "/v2/health/ready", "/health"),
    (docker.image_is_small_and_unprivileged, DOCKERFILE, "127.0.0.1:8000", "127.0.0.1:8080"),
    (docker.compose_follows_its_schema, COMPOSE, "mem_limit: 2g", "memory_limit: 2g"),
    (docker.compose_follows_its_schema, GPU, "capabilities: [gpu]", "capabilities: gpu"),
    (docker.compose_is_locked_down, COMPOSE, "read_only: true\n  cap_drop", "cap_drop"),
    (docker.compose_is_locked_down, COMPOSE, "127.0.0.1:8000:8000", "8000:8000"),
    (docker.compose_is_locked_down, COMPOSE, "source: ../settings.toml", "source: ../limits.toml"),
    (docker.compose_is_locked_down, COMPOSE, "stop_grace_period: 45s", "stop_grace_period: 30s"),
    (docker.compose_is_locked_down, COMPOSE, "secrets: [api-keys]", "secrets: [keys]"),
    (docker.compose_is_locked_down, "settings.toml", "drain_seconds = 30.0", "drain_seconds = 45.0"),
    (docker.gpu_changes_only_what_it_must, GPU, "      - --api-key-file=/run/secrets/api-keys\n", ""),
    (docker.gpu_changes_only_what_it_must, GPU, "gpu,serve", "cpu,serve"),
    (docker.options_exist, COMPOSE, "--settings=", "--config="),
    (docker.options_exist, DOCKERFILE, '"--host"', '"--address"'),
    (docker.options_exist, DEPLOYMENT, "--api-key-file=", "--api-keys="),
    (monitoring.prometheus_finds_the_server, PROMETHEUS, "server:8000", "server:8001"),
    (monitoring.prometheus_finds_the_server, PROMETHEUS, "[alerts.yml]", "[rules.yml]"),
    (monitoring.prometheus_finds_the_server, COMPOSE, "target: /etc/prometheus/prometheus-key", "target: /key"),
    (monitoring.prometheus_finds_the_server, ALERTS, 'process_open_fds{job="mpdsgr"}', "process_open_fds{}"),
    (monitoring.prometheus_reads_its_files, PROMETHEUS, "scrape_interval", "scrape_every"),
    (monitoring.prometheus_reads_its_files, PROMETHEUS, "prometheus-key}", "no-such-key}"),
    (monitoring.prometheus_reads_its_files, "monitoring/prometheus-kubernetes.yml", "action: keep", "action: want"),
    (monitoring.rules_lint, ALERTS, "changes(process_start", "changes((process_start"),
    (monitoring.rules_lint, ALERTS, "alert: MpdsgrSlow", "alert: MpdsgrSlow\n        after: 1m"),
    (monitoring.rules_pass_their_tests, ALERTS, 'code=~"5..|INTERNAL', 'code=~"5..|INTERN'),
    (monitoring.rules_pass_their_tests, ALERTS, "histogram_quantile(0.99", "histogram_quantile(0.9"),
    (monitoring.rules_pass_their_tests, ALERTS, "max by (instance, model, process)", "max by (instance, model)"),
    (monitoring.rules_pass_their_tests, ALERTS, "* 86400 > 1e9", "* 86400 > 1e10"),
    (monitoring.rules_pass_their_tests, ALERTS, "alert: MpdsgrSlow", "alert: MpdsgrLate"),
    (monitoring.rules_pass_their_tests, ALERTS_TEST, "      - {eval_time: 4h, alertname: MpdsgrGpuMemory}\n", ""),
    (monitoring.dashboard_is_whole, DASHBOARD, "histogram_quantile(0.99, sum", "histogram_quantile(sum"),
    (monitoring.dashboard_is_whole, DASHBOARD, "${datasource}", "${source}"),
    (monitoring.dashboard_is_whole, DASHBOARD, '"w": 9', '"w": 10'),
    (
        kubernetes.kubernetes_validates,
        DEPLOYMENT,
        "readOnly: true\n            - name: settings",
        "readonly: true\n            - name: settings",
    ),
    (kubernetes.kubernetes_validates, SERVICE, "port: 8001", 'port: "grpc"'),
    (kubernetes.kubernetes_validates, f"{CPU}/autoscaler.yaml", "autoscaling/v2", "autoscaling/v2beta2"),
    (kubernetes.kubernetes_validates, "kubernetes/gpu/kustomization.yaml", "newTag: gpu", "newTag: cpu"),
    (kubernetes.pod_is_restricted, DEPLOYMENT, "runAsUser: 10001", "runAsUser: 0"),
    (kubernetes.pod_is_restricted, DEPLOYMENT, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    (kubernetes.manifests_fit_each_other, DEPLOYMENT, "path: /v2/health/live", "path: /v2/health/ready"),
    (kubernetes.manifests_fit_each_other, DEPLOYMENT, "GracePeriodSeconds: 60", "GracePeriodSeconds: 30"),
    (kubernetes.manifests_fit_each_other, DEPLOYMENT, "mountPath: /etc/mpdsgr", "mountPath: /etc/settings"),
    (kubernetes.manifests_fit_each_other, SERVICE, "targetPort: grpc", "targetPort: rpc"),
    (kubernetes.pod_monitor_finds_the_pods, "monitoring/podmonitor.yaml", "port: http", "port: metrics"),
    (kubernetes.manifests_fit_each_other, f"{CPU}/disruption.yaml", "name: mpdsgr-serve\n", "name: mpdsgr\n"),
    (kubernetes.manifests_fit_each_other, f"{CPU}/settings.toml", "grace_seconds = 10.0", "grace_seconds = 40.0"),
    (kubernetes.manifests_fit_each_other, "kubernetes/gpu/deployment.yaml", "            - /bundles/digits\n", ""),
]
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's package prometheus, is not here")


def marked(check: Check, *values: str, name: str) -> object:
    return pytest.param(check, *values, id=name, marks=[needs_promtool] if check in WITH_PROMTOOL else [])


@pytest.fixture
def serve(tmp_path: Path) -> Path:
    """A copy of `serve/`."""
    return Path(shutil.copytree(ROOT / "serve", tmp_path / "serve"))


@pytest.mark.parametrize("check", [marked(check, name=check.__name__) for check in [*CHECKS, *WITH_PROMTOOL]])
def test_files_hold(check: Check, serve: Path) -> None:
    check(serve)


@pytest.mark.parametrize(
    ("check", "file", "old", "new"),
    [marked(check, *fault, name=f"{check.__name__}-{index}") for index, (check, *fault) in enumerate(FAULTS)],
)
def test_faults_are_found(check: Check, file: str, old: str, new: str, serve: Path) -> None:
    text = (serve / file).read_text()
    assert old in text
    (serve / file).write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        check(serve)


def test_every_check_is_seen_to_fail() -> None:
    assert {check for check, *_ in FAULTS} == {*CHECKS, *WITH_PROMTOOL}


def test_the_error_alerts_know_every_status() -> None:
    """The server's own failures, over both protocols; RESOURCE_EXHAUSTED is also a client's too large request."""
    alerts = monitoring.alerts(ROOT / "serve")

    def counted(alert: str) -> set[str]:
        pattern = re.search(r'code=~"(.*?)"', alerts[alert])
        assert pattern is not None
        known = {str(why.status) for why in Why} | {why.grpc for why in Why} | {"200", "OK"}
        return {code for code in known if re.fullmatch(pattern[1], code)}

    failures = [why for why in Why if why.status >= 500]
    expected = {str(why.status) for why in failures} | {why.grpc for why in failures}
    assert counted("MpdsgrErrors") == expected - {"RESOURCE_EXHAUSTED"}
    assert counted("MpdsgrKeysRefused") == {"401", "UNAUTHENTICATED"}


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore leaves a file out of the build: the last pattern that matches it or a parent decides."""
    parts = path.split("/")
    ancestors = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    out = False
    for pattern in patterns:
        name = pattern.removeprefix("!")
        deep = name.removeprefix("**/")
        if any(fnmatch(one, name) or (deep != name and fnmatch(one.rsplit("/", 1)[-1], deep)) for one in ancestors):
            out = not pattern.startswith("!")
    return out


def test_the_image_is_built_from_what_the_wheel_needs(tmp_path: Path) -> None:
    """The lines of the Dockerfile's first stage need no more than its .dockerignore lets through; no key gets there."""
    lines = (ROOT / "serve/docker/Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    context = tmp_path / "context"
    for name in (name for name in listed if name and (ROOT / name).is_file() and not ignored(name, patterns)):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    assert (context / "constraints.txt").exists()
    tops = {path.name for path in context.iterdir()}
    assert not tops & {"tests", "benchmarks", ".git", "Makefile", "runs", "data"}
    for secret in ("serve/docker/.env", "serve/docker/secrets/api-keys", ".env", "export/secrets/key"):
        assert ignored(secret, patterns)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(context)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in ("serve/settings.toml", "serve/docker/Dockerfile", "serve/monitoring/alerts.yml", "serve/README.md"):
        assert f"mpdsgr_deploy/shipped/{name}" in inside
    assert "mpdsgr_deploy/cli/serve.py" in inside
    extras = re.search(r"ARG EXTRAS=(\S+)", (ROOT / "serve/docker/Dockerfile").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert extras is not None
    for extra in {
        *extras[1].split(","),
        *load(ROOT / "serve" / GPU)["services"]["server"]["build"]["args"]["EXTRAS"].split(","),
    }:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


@pytest.mark.parametrize("page", sorted((ROOT / "serve").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_what_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    assert os.stat(page).st_size < (20_000 if page.parent.name == "serve" else 12_000)  # one page, or the manual
