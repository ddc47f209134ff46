"""KServe resources for bundles: an InferenceService each, on Triton or on our own server.

An InferenceService fetches its own model alone, to /mnt/models/NAME: for Triton /mnt/models is then a repository of one
model, which it serves under its own name, with the interface that loads and unloads models switched off.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose, need
from mpdsgr_deploy.serving.deploy.models import Chosen
from mpdsgr_deploy.serving.deploy.output import output_directory
from mpdsgr_deploy.serving.deploy.triton import IMAGE

SUMS = "mpdsgr-kserve.sha256"
RUNTIME = "mpdsgr-triton"
CONTAINER, MODELS = "kserve-container", "/mnt/models"  # KServe's own names
HTTP, GRPC, METRICS = 8080, 9000, 8002
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/]\S*")
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST = 50  # of a name, to which KServe appends -predictor and more, 63 in all
Resource = dict[str, Any]


def write_resources(
    models: Sequence[Chosen],
    out: Path,
    storage_uri: str,
    runtime: str = "triton",
    image: str | None = None,
    gpus: int = 0,
) -> list[str]:
    """Write the resources of each model to `out`, fresh or an earlier one; the names of the files.

    storage_uri: the parent of what each model needs: of its directory in a model repository, or of its bundle.
    runtime: of RUNTIMES; image: the server's; gpus: of a replica. Raises InputError for a URI that is none, a name that
    Kubernetes does not take or that two would have, an image that is missing, and where `out` cannot be written.
    """
    make = choose("runtime", RUNTIMES, runtime)
    if not SCHEME.fullmatch(storage_uri):
        raise InputError(f"--storage-uri {storage_uri!r} is no place KServe reads; write for example s3://BUCKET/PATH")
    resources = make(models, storage_uri.rstrip("/"), image, gpus)
    yaml = need("yaml", "serve")
    with output_directory(out, SUMS, "directory of KServe resources") as scratch:
        for name, resource in resources.items():
            text = yaml.safe_dump(resource, sort_keys=False, width=120)
            (scratch / name).write_text(text, encoding="utf-8")
    return list(resources)


def _on_triton(models: Sequence[Chosen], uri: str, image: str | None, gpus: int) -> dict[str, Resource]:
    command = [
        "tritonserver",
        f"--model-repository={MODELS}",
        f"--http-port={HTTP}",
        f"--grpc-port={GRPC}",
        f"--metrics-port={METRICS}",
        "--exit-timeout-secs=25",
    ]
    server = {
        "name": CONTAINER,
        "image": image or IMAGE,
        "args": command,
        "env": [{"name": "NVIDIA_TF32_OVERRIDE", "value": "0"}],  # TF32 would flip spikes
        **_common(),
    }
    spec = {
        "annotations": {"prometheus.kserve.io/path": "/metrics", "prometheus.kserve.io/port": str(METRICS)},
        "supportedModelFormats": [{"name": "triton", "version": "2", "autoSelect": False}],
        "protocolVersions": ["v2", "grpc-v2"],
        "containers": [server],
        "volumes": [_scratch()],
    }
    resources = {f"{RUNTIME}.yaml": _resource("v1alpha1", "ServingRuntime", RUNTIME, spec)}
    for model in models:
        network = {
            "modelFormat": {"name": "triton", "version": "2"},
            "runtime": RUNTIME,
            "protocolVersion": "v2",
            "resources": _resources(gpus),
        }
        predictor = {**_pod(1000), "model": network, "storageUris": _from(f"{uri}/{model.name}", model)}
        _add(resources, model, predictor)
    return resources


def _on_mpdsgr(models: Sequence[Chosen], uri: str, image: str | None, gpus: int) -> dict[str, Resource]:
    if not image:
        raise InputError(
            "--runtime mpdsgr needs --image: the one you built from serve/docker, where the cluster finds it"
        )
    backend = "onnxruntime-cuda" if gpus else "onnxruntime-cpu"
    resources: dict[str, Resource] = {}
    for model in models:
        bundle = f"{model.name}={MODELS}/{model.name}@{model.precision}"
        server = {
            "name": CONTAINER,
            "image": image,
            "command": ["mpdsgr", "serve", bundle],
            # --insecure: plain HTTP inside the cluster, whose gateway decides who comes in
            "args": ["--host=0.0.0.0", f"--port={HTTP}", f"--grpc-port={GRPC}", f"--backend={backend}", "--insecure"],
            **_common(),
            "resources": _resources(gpus),
        }
        directory = model.bundle.path.resolve().name
        predictor = {
            "annotations": {"prometheus.kserve.io/path": "/metrics", "prometheus.kserve.io/port": str(HTTP)},
            **_pod(10001),
            "containers": [server],
            "storageUris": _from(f"{uri}/{directory}", model),
            "volumes": [_scratch()],
        }
        _add(resources, model, predictor)
    return resources


RUNTIMES: dict[str, Callable[[Sequence[Chosen], str, str | None, int], dict[str, Resource]]] = {
    "triton": _on_triton,
    "mpdsgr": _on_mpdsgr,
}


def _resource(version: str, kind: str, name: str, spec: Resource) -> Resource:
    return {"apiVersion": f"serving.kserve.io/{version}", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _add(resources: dict[str, Resource], model: Chosen, predictor: Resource) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")
    if not LABEL.fullmatch(name) or len(name) > LONGEST:
        raise InputError(
            f"{model.name!r} cannot name an InferenceService (a letter first, {LONGEST} characters at most); "
            f"write NAME={model.bundle.path}"
        )
    file = f"{name}.yaml"
    if file in resources:
        raise InputError(f"two resources would be called {name!r}; write NAME=BUNDLE for one of them")
    resources[file] = _resource("v1beta1", "InferenceService", name, {"predictor": predictor})


def _from(uri: str, model: Chosen) -> list[Resource]:
    return [{"uri": uri, "mountPath": f"{MODELS}/{model.name}"}]


def _pod(user: int) -> Resource:
    """Of every predictor: not root, one replica at least, so that no request waits for a start."""
    identity = {"runAsNonRoot": True, "runAsUser": user, "fsGroup": user, "seccompProfile": {"type": "RuntimeDefault"}}
    return {"minReplicas": 1, "terminationGracePeriodSeconds": 30, "securityContext": identity}


def _common() -> Resource:
    """Of every container: ports, probes, resources and no rights. Loading may take five minutes."""
    return {
        "ports": [{"name": "http1", "containerPort": HTTP, "protocol": "TCP"}],
        "startupProbe": _probe("ready", period=5, failures=60),
        "readinessProbe": _probe("ready", period=5, failures=2),
        "livenessProbe": _probe("live", period=10, failures=3),
        "resources": _resources(0),
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }


def _probe(what: str, period: int, failures: int) -> Resource:
    get = {"path": f"/v2/health/{what}", "port": HTTP}
    return {"httpGet": get, "periodSeconds": period, "timeoutSeconds": 3, "failureThreshold": failures}


def _scratch() -> Resource:
    """The one place to write to on a read-only root."""
    return {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}


def _resources(gpus: int) -> Resource:
    devices = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {"requests": {"cpu": "1", "memory": "2Gi", **devices}, "limits": {"cpu": "2", "memory": "2Gi", **devices}}
