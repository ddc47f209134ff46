"""KServe resources for bundles: an InferenceService for each, on Triton or on `mpdsgr serve`.

KServe fetches the bundle of `mpdsgr serve` from `storageUri` to /mnt/models. Triton needs the directory above its
model: for a single model, `storageUri` names the repository; for several, `storageUris` puts each at /mnt/models/NAME.
The resources ask for the deployment mode Standard, because KServe's default mode forbids volumes and a termination
time.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpdsgr_deploy.demand import Demand
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose, need
from mpdsgr_deploy.serving.deploy.output_directory import output_directory
from mpdsgr_deploy.serving.deploy.triton import IMAGE
from mpdsgr_deploy.serving.source import Chosen
from mpdsgr_deploy.signing.trust import Trust

SUMS = "mpdsgr-kserve.sha256"
RUNTIME = "mpdsgr-triton"
CONTAINER, MODELS = "kserve-container", "/mnt/models"  # names that KServe prescribes
# the ConfigMap, the directory and the file of the key that must have signed the bundles
TRUST, KEY_PLACE, KEY = "mpdsgr-trust", "/etc/mpdsgr-trust", "trust.pem"
HTTP, GRPC, METRICS = 8080, 9000, 8002
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/]\S*")
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
STANDARD = {"serving.kserve.io/deploymentMode": "Standard"}
ENDING = 45  # seconds until a pod is killed; both servers need less to answer accepted requests
SINGLE_ONLY = ("pvc", "oci", "hf", "https", "http")  # schemes that storageUris does not fetch, or not with a path
LONGEST = 50  # characters of a name, to which KServe appends -predictor and more, up to 63
Resource = dict[str, Any]


class ReplicaSpec(NamedTuple):
    """The replicas of one model: container image, GPUs, CPU cores, memory such as "2Gi", and service account.

    replicas: the smallest and the largest number. demand: the signatures that `mpdsgr serve` requires; Triton cannot
    require any, so its files are verified beforehand.
    """

    image: str | None = None
    gpus: int = 0
    cpus: int = 2
    memory: str = "2Gi"
    replicas: tuple[int, int] = (1, 1)
    service_account: str | None = None
    demand: Demand = Demand()

    def check(self) -> None:
        """Raise InputError for a value that Kubernetes does not accept."""
        least, most = self.replicas
        if not 0 <= least <= most or most < 1:
            raise InputError(f"--replicas {least},{most}: write the smallest and the largest number, for example 1,4")
        if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|M|G)", self.memory):
            raise InputError(f"--memory {self.memory!r} is not an amount of memory; write for example 2Gi")
        if self.service_account is not None and not LABEL.fullmatch(self.service_account):
            raise InputError(
                f"--service-account {self.service_account!r} is not a valid Kubernetes name; use lower-case letters, "
                "digits, - and ."
            )


def write_resources(
    models: Sequence[Chosen],
    out: Path,
    storage_uri: str,
    runtime: str = "triton",
    replica: ReplicaSpec = ReplicaSpec(),  # noqa: B008 - it is immutable
) -> list[str]:
    """Write the resources of each model to the directory `out`, and return the names of the files.

    out: does not exist, or was written by an earlier call; a file that was edited since is kept, and its new content is
    written beside it as NAME.new. storage_uri: the parent of the directories of models in a model repository, or of
    bundles. runtime: a key of RUNTIMES.

    Raises InputError for a URI that is invalid or that KServe cannot fetch, a name that Kubernetes does not accept or
    that two models would have, a missing image, and if `out` cannot be written.
    """
    make = choose("runtime", RUNTIMES, runtime)
    replica.check()
    if not SCHEME.fullmatch(storage_uri):
        raise InputError(f"KServe cannot read --storage-uri {storage_uri!r}; write for example s3://BUCKET/PATH")
    resources = make(models, storage_uri.rstrip("/"), replica)
    yaml = need("yaml", "serve")
    with output_directory(out, SUMS, "directory of KServe resources", keep_edits=True) as scratch:
        for name, resource in resources.items():
            text = yaml.safe_dump(resource, sort_keys=False, width=120)
            (scratch / name).write_text(text, encoding="utf-8")
    return list(resources)


def _triton_runtime(replica: ReplicaSpec) -> Resource:
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
        "image": replica.image or IMAGE,
        "args": command,
        "env": [{"name": "NVIDIA_TF32_OVERRIDE", "value": "0"}, _threads(replica)],  # TF32 would flip spikes
        **_common(replica),
    }
    spec = {
        "annotations": {"prometheus.kserve.io/path": "/metrics", "prometheus.kserve.io/port": str(METRICS)},
        "supportedModelFormats": [{"name": "triton", "version": "2", "autoSelect": False}],
        "protocolVersions": ["v2", "grpc-v2"],
        "containers": [server],
        "volumes": [_scratch()],
    }
    return _resource("v1alpha1", "ServingRuntime", RUNTIME, spec)


def _on_triton(models: Sequence[Chosen], uri: str, replica: ReplicaSpec) -> dict[str, Resource]:
    resources = {f"{RUNTIME}.yaml": _triton_runtime(replica)}
    scheme = uri.partition(":")[0]
    if len(models) > 1 and scheme in SINGLE_ONLY:
        raise InputError(
            f"KServe does not fetch several {scheme}:// directories for Triton; write one repository per model, "
            "and run this command once for each"
        )
    for model in models:
        network: Resource = {
            "modelFormat": {"name": "triton", "version": "2"},
            "runtime": RUNTIME,
            "protocolVersion": "v2",
            "resources": _resources(replica),
        }
        predictor = {**_pod(1000, replica), "model": network}
        if len(models) == 1:
            network["storageUri"] = uri
        else:
            predictor["storageUris"] = [{"uri": f"{uri}/{model.name}", "mountPath": f"{MODELS}/{model.name}"}]
        _add(resources, model, predictor)
    return resources


def _on_mpdsgr(models: Sequence[Chosen], uri: str, replica: ReplicaSpec) -> dict[str, Resource]:
    if not replica.image:
        raise InputError(
            "--runtime mpdsgr needs --image, the image that you built from serve/docker, in a registry that the "
            "cluster can reach"
        )
    backend = "onnxruntime-cuda" if replica.gpus else "onnxruntime-cpu"
    resources: dict[str, Resource] = {}
    for model in models:
        bundle = f"{model.name}={MODELS}@{model.precision}"
        server = {
            "name": CONTAINER,
            "image": replica.image,
            "command": ["mpdsgr", "serve", bundle],
            # --insecure: plain HTTP inside the cluster, whose gateway decides who comes in
            "args": [
                *("--host=0.0.0.0", f"--port={HTTP}", f"--grpc-port={GRPC}", f"--backend={backend}", "--insecure"),
                *_signature_options(replica.demand),
            ],
            # KServe's webhook fetches what STORAGE_URI names to MODELS, for custom containers too
            "env": [{"name": "STORAGE_URI", "value": f"{uri}/{model.bundle.path.resolve().name}"}, _threads(replica)],
            **_common(replica),
        }
        predictor = {
            "annotations": {"prometheus.kserve.io/path": "/metrics", "prometheus.kserve.io/port": str(HTTP)},
            **_pod(10001, replica),
            "containers": [server],
            "volumes": [_scratch()],
        }
        if replica.demand.trust is not None and replica.demand.trust.pem:
            server["volumeMounts"] = [
                *server["volumeMounts"],
                {"name": TRUST, "mountPath": KEY_PLACE, "readOnly": True},
            ]
            predictor["volumes"] = [_scratch(), {"name": TRUST, "configMap": {"name": TRUST}}]
            resources[f"{TRUST}.yaml"] = _key_map(replica.demand.trust)
        _add(resources, model, predictor)
    return resources


def _signature_options(demand: Demand) -> list[str]:
    """Return the options of `mpdsgr serve` for the signatures that a bundle must have."""
    if demand.trust is None:
        return []
    trust = demand.trust
    key = f"{KEY_PLACE}/{KEY}" if trust.pem else f"{trust.name},{trust.issuer}"
    verdict = [] if demand.tier is None else [f"--require-verdict={demand.tier}"]
    return [f"--require-signature={key}", *verdict]


def _key_map(trust: Trust) -> Resource:
    data = {KEY: trust.pem.decode(errors="replace")}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": TRUST}, "data": data}


RUNTIMES: dict[str, Callable[[Sequence[Chosen], str, ReplicaSpec], dict[str, Resource]]] = {
    "triton": _on_triton,
    "mpdsgr": _on_mpdsgr,
}


def _resource(version: str, kind: str, name: str, spec: Resource) -> Resource:
    metadata: Resource = {"name": name}
    if kind == "InferenceService":
        metadata["annotations"] = dict(STANDARD)
    return {"apiVersion": f"serving.kserve.io/{version}", "kind": kind, "metadata": metadata, "spec": spec}


def _add(resources: dict[str, Resource], model: Chosen, predictor: Resource) -> None:
    """Add the InferenceService of a model. Raises InputError for a name that is invalid or exists already."""
    name = re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")
    if not LABEL.fullmatch(name) or len(name) > LONGEST:
        raise InputError(
            f"{model.name!r} is not a valid name for an InferenceService (it must begin with a letter and have at "
            f"most {LONGEST} characters); write NAME={model.bundle.path}"
        )
    file = f"{name}.yaml"
    if file in resources:
        raise InputError(f"two resources would be called {name!r}; write NAME=BUNDLE to rename one of them")
    resources[file] = _resource("v1beta1", "InferenceService", name, {"predictor": predictor})


def _threads(replica: ReplicaSpec) -> Resource:
    """Return the variable that sets a thread per core of the limit; one per core of the node would exceed it."""
    return {"name": "OMP_NUM_THREADS", "value": str(replica.cpus)}


def _pod(user: int, replica: ReplicaSpec) -> Resource:
    """Return fields of every predictor: it does not run as root, and has time to answer accepted requests."""
    identity = {"runAsNonRoot": True, "runAsUser": user, "fsGroup": user, "seccompProfile": {"type": "RuntimeDefault"}}
    least, most = replica.replicas
    account = {} if replica.service_account is None else {"serviceAccountName": replica.service_account}
    scale = {"minReplicas": least, "maxReplicas": most}
    return {**scale, "terminationGracePeriodSeconds": ENDING, "securityContext": identity, **account}


def _common(replica: ReplicaSpec) -> Resource:
    """Return fields of every container: ports, probes, resources, no privileges. Loading may take five minutes."""
    return {
        "ports": [{"name": "http1", "containerPort": HTTP, "protocol": "TCP"}],
        "startupProbe": _probe("ready", period=5, failures=60),
        "readinessProbe": _probe("ready", period=5, failures=2),
        "livenessProbe": _probe("live", period=10, failures=3),
        "resources": _resources(replica),
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
    """Return the only volume that a container may write to."""
    return {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}


def _resources(replica: ReplicaSpec) -> Resource:
    devices = {"nvidia.com/gpu": str(replica.gpus)} if replica.gpus else {}
    amount = {"cpu": str(replica.cpus), "memory": replica.memory, **devices}
    return {"requests": amount, "limits": dict(amount)}
