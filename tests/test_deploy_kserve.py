"""KServe resources: they follow the schemas of KServe and Kubernetes, and fit the model repository and the server."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import assert_input_error, mpdsgr_here
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.serving.deploy.kserve import HTTP, MODELS, RUNTIME, SUMS
from mpdsgr_deploy.serving.deploy.triton import IMAGE
from mpdsgr_deploy.serving.settings import Limits

KUBERNETES = "1.37.0"
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "kserve-0.21.0.json").read_text())
URI = "s3://models/triton"


KINDS = {d["properties"]["kind"]["const"]: name for name, d in SCHEMA["$defs"].items() if "kind" in d["properties"]}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Draft202012Validator]:
    """KServe's own types by kind, and under them those of Kubernetes, both without room for unknown fields."""
    root = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    types = json.loads((root / "_definitions.json").read_text())
    registry = [Resource.from_contents(content) for content in (types, SCHEMA)] @ Registry()
    reference = f"{SCHEMA['$id']}#/$defs"
    return {k: Draft202012Validator({"$ref": f"{reference}/{n}"}, registry=registry) for k, n in KINDS.items()}


def errors(schemas: dict[str, Draft202012Validator], resource: Any) -> list[str]:
    """What does not fit the kind that a resource says it is."""
    return [f"{error.json_path}: {error.message}" for error in schemas[resource["kind"]].iter_errors(resource)]


def deploy(out: Path, *arguments: object, uri: str = URI) -> subprocess.CompletedProcess[str]:
    return mpdsgr_here("deploy", "kserve", *arguments, "--out", out, "--storage-uri", uri)


def resources(out: Path) -> dict[str, Any]:
    """What kubectl would read of the directory, by file name without its suffix."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(out.glob("*.yaml"))}


@pytest.fixture
def on_triton(precise: Bundle, tmp_path: Path) -> dict[str, Any]:
    done = deploy(tmp_path / "out", precise.path, f"{precise.path}@int8", "--gpus", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"resources in {tmp_path / 'out'}; next: kubectl apply -f {tmp_path / 'out'}"
    return resources(tmp_path / "out")


@pytest.fixture
def on_mpdsgr(precise: Bundle, tmp_path: Path) -> dict[str, Any]:
    options = ("--runtime", "mpdsgr", "--image", "registry.local/mpdsgr-serve:cpu")
    done = deploy(tmp_path / "own", precise.path, f"{precise.path}@int8", *options, uri="pvc://bundles/robust/")
    assert done.returncode == 0, done.stderr
    return resources(tmp_path / "own")


def test_all_resources_follow_the_schemas(
    on_triton: dict[str, Any], on_mpdsgr: dict[str, Any], schemas: dict[str, Draft202012Validator]
) -> None:
    assert sorted(on_triton) == [RUNTIME, "precise", "precise-int8"]
    assert sorted(on_mpdsgr) == ["precise", "precise-int8"]
    for resource in (*on_triton.values(), *on_mpdsgr.values()):
        assert errors(schemas, resource) == []


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an unknown field": (lambda spec: spec.update(containerz=[]), "containerz"),
    "no containers": (lambda spec: spec.pop("containers"), "'containers' is a required property"),
    "a number": (lambda spec: spec["annotations"].update(port=8002), "8002 is not of type 'string'"),
    "a port": (lambda spec: spec["containers"][0]["ports"][0].update(containerPort="http"), "'http' is not of type"),
    "a probe": (lambda spec: spec["containers"][0]["livenessProbe"].update(httpget={}), "httpget"),
    "a container": (lambda spec: spec["containers"][0].pop("name"), "'name' is a required property"),
    "a volume": (lambda spec: spec["volumes"][0].update(emptydir={}), "emptydir"),
    "a format": (lambda spec: spec["supportedModelFormats"][0].update(autoselect=True), "autoselect"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_schemas_find_what_is_wrong(
    what: str, on_triton: dict[str, Any], schemas: dict[str, Draft202012Validator]
) -> None:
    broken, (edit, expected) = copy.deepcopy(on_triton[RUNTIME]), WRONG[what]
    edit(broken["spec"])
    assert any(expected in error for error in errors(schemas, broken)), errors(schemas, broken)


def test_each_service_fetches_its_own_model_from_the_repository(on_triton: dict[str, Any]) -> None:
    runtime = on_triton.pop(RUNTIME)["spec"]
    (server,) = runtime["containers"]
    assert server["image"] == IMAGE
    assert f"--model-repository={MODELS}" in server["args"]
    assert not [argument for argument in server["args"] if "control" in argument]  # clients load and unload nothing
    for name, service in on_triton.items():
        predictor = service["spec"]["predictor"]
        assert service["metadata"]["name"] == name
        assert predictor["storageUris"] == [{"uri": f"{URI}/{name}", "mountPath": f"{MODELS}/{name}"}]
        assert predictor["model"]["runtime"] == RUNTIME
        (supported,) = runtime["supportedModelFormats"]
        assert predictor["model"]["modelFormat"].items() <= supported.items()
        assert predictor["model"]["protocolVersion"] in runtime["protocolVersions"]
        assert predictor["model"]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_our_own_server_gets_its_bundle_and_precision(on_mpdsgr: dict[str, Any]) -> None:
    for name, service in on_mpdsgr.items():
        predictor = service["spec"]["predictor"]
        (server,) = predictor["containers"]
        precision = "int8" if name.endswith("int8") else "fp32"
        assert server["command"] == ["mpdsgr", "serve", f"{name}={MODELS}@{precision}"]
        assert {"name": "STORAGE_URI", "value": "pvc://bundles/robust/precise"} in server["env"]
        assert {"name": "OMP_NUM_THREADS", "value": "2"} in server["env"]
        assert "storageUris" not in predictor  # which drops a claim's path
        assert f"--port={HTTP}" in server["args"]
        assert "nvidia.com/gpu" not in server["resources"]["limits"]


def test_one_model_on_triton_comes_by_storage_uri(precise: Bundle, tmp_path: Path) -> None:
    assert deploy(tmp_path / "out", precise.path, uri="pvc://models/triton").returncode == 0
    predictor = resources(tmp_path / "out")["precise"]["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == "pvc://models/triton"
    assert "storageUris" not in predictor


def test_services_can_be_created_and_end_after_what_they_accepted(
    on_triton: dict[str, Any], on_mpdsgr: dict[str, Any]
) -> None:
    """KServe's default deployment mode refuses what is written here."""
    limits = Limits()
    for service in [s for s in (*on_triton.values(), *on_mpdsgr.values()) if s["kind"] == "InferenceService"]:
        assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
        ending = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
        assert ending > limits.grace_seconds + limits.drain_seconds


def test_a_replica_is_sized_by_options(
    precise: Bundle, tmp_path: Path, schemas: dict[str, Draft202012Validator]
) -> None:
    options = ("--cpus", 4, "--memory", "8Gi", "--replicas", "2,6", "--service-account", "reader")
    for runtime in (["triton"], ["mpdsgr", "--image", "a:b"]):
        out = tmp_path / runtime[0]
        done = deploy(out, precise.path, "--runtime", *runtime, *options)
        assert done.returncode == 0, done.stderr
        predictor = resources(out)["precise"]["spec"]["predictor"]
        assert errors(schemas, resources(out)["precise"]) == []
        assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 6)
        assert predictor["serviceAccountName"] == "reader"
        server = predictor.get("model") or predictor["containers"][0]
        assert server["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    environment = resources(tmp_path / "triton")[RUNTIME]["spec"]["containers"][0]["env"]
    assert {"name": "OMP_NUM_THREADS", "value": "4"} in environment


def test_nothing_runs_as_root_and_every_container_is_probed(
    on_triton: dict[str, Any], on_mpdsgr: dict[str, Any]
) -> None:
    runtime = on_triton.pop(RUNTIME)
    predictors = [s["spec"]["predictor"] for s in (*on_triton.values(), *on_mpdsgr.values())]
    for predictor in predictors:
        assert predictor["securityContext"]["runAsNonRoot"]
        assert predictor["securityContext"]["runAsUser"] > 0
        assert predictor["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for owner in (runtime["spec"], *(p for p in predictors if "containers" in p)):
        (server,) = owner["containers"]
        assert server["name"] == "kserve-container"
        rights = server["securityContext"]
        assert rights["readOnlyRootFilesystem"]
        assert not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in owner["volumes"]}
        assert set(server["resources"]) == {"requests", "limits"}
        ports = {port["containerPort"] for port in server["ports"]}
        for probe, what in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
            assert server[probe]["httpGet"]["path"] == f"/v2/health/{what}"
            assert server[probe]["httpGet"]["port"] in ports


def test_names_become_those_of_kubernetes(precise: Bundle, tmp_path: Path) -> None:
    bundle = shutil.copytree(precise.path, tmp_path / "VGG_11.v2")
    assert deploy(tmp_path / "out", bundle).returncode == 0
    found = resources(tmp_path / "out")["vgg-11-v2"]
    assert found["metadata"]["name"] == "vgg-11-v2"
    assert found["spec"]["predictor"]["model"]["storageUri"] == URI


def test_kubectl_reads_nothing_else_and_a_second_call_replaces_the_first(precise: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert deploy(out, precise.path, f"{precise.path}@int8").returncode == 0
    done = deploy(out, precise.path, "--json")
    assert json.loads(done.stdout)["files"] == [f"{RUNTIME}.yaml", "precise.yaml"]
    assert sorted(p.name for p in out.iterdir()) == [SUMS, f"{RUNTIME}.yaml", "precise.yaml"]
    assert not re.search(r"\.(json|ya?ml)$", SUMS)  # what kubectl apply -f would read
    assert not re.search(r"[&*]id\d", (out / f"{RUNTIME}.yaml").read_text())
    text = (out / "precise.yaml").read_text()
    edited = text.replace("2Gi", "8Gi")
    (out / "precise.yaml").write_text(edited)
    for _ in range(2):  # an edit stays, and what would be there is shown
        done = deploy(out, precise.path, "--cpus", 3)
        assert done.returncode == 0, done.stderr
        assert (out / "precise.yaml").read_text() == edited
        assert "cpu: '3'" in (out / "precise.yaml.new").read_text()
    (out / "mine.yaml").write_text("a: b\n")
    assert_input_error(deploy(out, precise.path), "mine.yaml, which this command did not write")


def test_wrong_choices_are_one_line(precise: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    odd, long = (shutil.copytree(precise.path, tmp_path / name) for name in ("11vgg", "v" * 51))
    twins = [shutil.copytree(precise.path, tmp_path / name) for name in ("a_b", "a.b")]
    assert_input_error(
        deploy(out, precise.path, uri="models/triton"), "KServe cannot read --storage-uri 'models/triton'"
    )
    assert_input_error(deploy(out, precise.path, uri="s3://"), "KServe cannot read --storage-uri")
    assert_input_error(deploy(out, odd), "'11vgg' is not a valid name for an InferenceService", "write NAME=")
    assert_input_error(deploy(out, long), "at most 50 characters")
    assert_input_error(deploy(out, *twins), "two resources would be called 'a-b'")
    assert_input_error(deploy(out, precise.path, "--runtime", "trition"), "did you mean 'triton'?")
    assert_input_error(deploy(out, precise.path, "--runtime", "mpdsgr"), "--runtime mpdsgr needs --image")
    both = (precise.path, f"{precise.path}@int8")
    assert_input_error(deploy(out, *both, uri="pvc://a/b"), "does not fetch several pvc:// directories")
    assert_input_error(deploy(out, *both, uri="oci://a/b"), "does not fetch several oci:// directories")
    assert_input_error(deploy(out, precise.path, "--replicas", "3,1"), "the smallest and the largest")
    assert_input_error(deploy(out, precise.path, "--memory", "much"), "--memory")
    assert not out.exists()
