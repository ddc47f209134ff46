"""Kubernetes manifests."""

from pathlib import Path
from typing import Any

from kubernetes_validate import SchemaNotFoundError, ValidationError, latest_version, validate
from ruamel.yaml import YAML

from serve_files import GRPC, HTTP, KUBECTL, LIVE, READY, accepts, ending, load
from serve_files.docker import final_stage

RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def of_cpu(serve: Path) -> list[Any]:
    """What the files of the CPU variant hold."""
    return [load(file) for file in (serve / "kubernetes/cpu").glob("*.yaml") if file.name != "kustomization.yaml"]


def manifests(serve: Path) -> dict[str, Any]:
    """Of the CPU variant, by kind."""
    return {manifest["kind"]: manifest for manifest in of_cpu(serve)}


def follows_its_schema(manifest: dict[str, Any]) -> None:
    try:
        validate(manifest, latest_version(), strict=True)
    except (ValidationError, SchemaNotFoundError) as error:
        raise AssertionError(error.message) from error


def kubernetes_validates(serve: Path) -> None:
    """Each file, and where there is kubectl each variant as it is applied."""
    for manifest in of_cpu(serve):
        follows_its_schema(manifest)
    for variant in ("cpu", "gpu") if KUBECTL else ():
        accepts("sh", "-ec", f"kubectl kustomize kubernetes/{variant} > {variant}.rendered", cwd=serve)
        try:
            rendered = [*YAML(typ="safe").load_all((serve / f"{variant}.rendered").read_text())]
        finally:
            (serve / f"{variant}.rendered").unlink()
        for one in rendered:
            follows_its_schema(one)
        (pod,) = (one["spec"]["template"]["spec"] for one in rendered if one["kind"] == "Deployment")
        assert pod["containers"][0]["image"].endswith(f":{variant}")
        maps = {one["metadata"]["name"] for one in rendered if one["kind"] == "ConfigMap"}
        assert {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume} == maps
        assert ("HorizontalPodAutoscaler" in {one["kind"] for one in rendered}) is (variant == "cpu")


def pod_is_restricted(serve: Path) -> None:
    """What the pod security standard `restricted` asks for, and a read-only root beside it."""
    found = manifests(serve)
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["securityContext"] == RESTRICTED
    user = spec["securityContext"]
    assert (user["runAsNonRoot"], user["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == final_stage(serve)["USER"]
    assert spec["automountServiceAccountToken"] is False
    assert "memory" in container["resources"]["limits"]
    assert all(mount["readOnly"] for mount in container["volumeMounts"] if mount["name"] != "tmp")
    assert found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert found["NetworkPolicy"]["spec"]["egress"] == []


def manifests_fit_each_other(serve: Path) -> None:
    """Probes ask what the server answers without a key, names name what is there, and the end is waited for."""
    found = manifests(serve)
    deployment, template = found["Deployment"], found["Deployment"]["spec"]["template"]
    spec, labels = template["spec"], template["metadata"]["labels"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": HTTP, "grpc": GRPC}
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": READY,
        "readiness": READY,
        "liveness": LIVE,
    }
    assert all(probe["port"] in ports for probe in probes.values())
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} == ports.keys()
    assert {
        port["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]
    } == ports.keys()
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    claim = volumes["bundles"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    secret = found["Secret"]
    assert secret["metadata"]["name"] == volumes["api-keys"]["secret"]["secretName"]
    files = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    options = dict(word.split("=", 1) for word in container["args"] if word.startswith("--"))
    keys, settings = Path(options["--api-key-file"]), Path(options["--settings"])
    assert files.get(str(keys.parent)) == "api-keys"
    assert keys.name in secret["stringData"]
    assert files.get(str(settings.parent)) == "settings"
    assert settings.name in load(serve / "kubernetes/cpu/kustomization.yaml")["configMapGenerator"][0]["files"]
    assert spec["terminationGracePeriodSeconds"] > ending(serve / "kubernetes/cpu/settings.toml")
    gpu = load(serve / "kubernetes/gpu/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [word for word in gpu if word != "--backend=onnxruntime-cuda"] == container["args"] != gpu


def pod_monitor_finds_the_pods(serve: Path) -> None:
    """By their labels and the name of their port. Its schema is the Prometheus Operator's."""
    monitor, pods = load(serve / "monitoring/podmonitor.yaml"), manifests(serve)["Deployment"]["spec"]["template"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert monitor["spec"]["selector"]["matchLabels"] == pods["metadata"]["labels"]
    (container,) = pods["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"] if port["containerPort"] == HTTP}
    assert endpoint["path"] == "/metrics"
