"""A real server answers stock clients of the Open Inference Protocol as the network itself would."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from google.protobuf.json_format import MessageToDict
from served import BUNDLE, INFER, Served, images, request

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.firing import FiringRates

CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Three networks at once: two precisions of one bundle, and one under a name of its own."""
    with Served(BUNDLE, f"{BUNDLE}@int8", f"other={BUNDLE}@fp16") as server:
        yield server


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(BUNDLE)


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Iterator[Predictor]:
    with open_predictor(bundle) as predictor:
        yield predictor


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, served: Served) -> Iterator[Any]:
    """A stock client, with the classes of its module: client.of.InferInput."""
    module = CLIENTS[request.param]
    with module.InferenceServerClient(f"127.0.0.1:{served.port if request.param == 'http' else served.grpc_port}") as c:
        c.of = module
        yield c


def told(answer: Any) -> dict[str, Any]:
    """What gRPC answers, as the dictionary that HTTP answers."""
    return answer if isinstance(answer, dict | list) else MessageToDict(answer, preserving_proto_field_name=True)


def given(of: Any, x: np.ndarray, **options: Any) -> list[Any]:
    tensor = of.InferInput("images", list(x.shape), "UINT8" if x.dtype == np.uint8 else "FP32")
    tensor.set_data_from_numpy(x, **options)
    return [tensor]


def test_hundreds_of_requests_get_the_same_logits_by_every_way(served: Served, predictor: Predictor) -> None:
    """Binary, JSON and gRPC, float32 and uint8, one to sixteen images, against the network in this process."""
    rng = np.random.default_rng(0)
    http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{served.port}")
    grpc = tritonclient.grpc.InferenceServerClient(served.grpc)
    for _ in range(300):
        shape = (rng.integers(1, 17), 1, 8, 8)
        pixels = rng.integers(0, 256, shape, np.uint8) if rng.random() < 0.5 else rng.random(shape, np.float32)
        unit = pixels / np.float32(255) if pixels.dtype == np.uint8 else pixels
        expected = predictor(unit)
        answers = [
            http.infer("bundle", given(tritonclient.http, pixels)),
            http.infer("bundle", given(tritonclient.http, pixels, binary_data=False)),
            grpc.infer("bundle", given(tritonclient.grpc, pixels)),
        ]
        for answer in answers:
            assert np.array_equal(answer.as_numpy("logits"), expected)


def test_every_network_answers_as_itself(client: Any, bundle: Bundle) -> None:
    x = images(5)
    for name, precision in (("bundle", "fp32"), ("bundle-int8", "int8"), ("other", "fp16")):
        with open_predictor(bundle, precision=precision) as predictor:
            assert np.array_equal(client.infer(name, given(client.of, x)).as_numpy("logits"), predictor(x))


def test_outputs_a_caller_can_act_on(client: Any, bundle: Bundle) -> None:
    x = images(4)
    with FiringRates(bundle) as network:
        logits, rates = network(x)
        layers = network.layers
    wanted = [client.of.InferRequestedOutput(name) for name in ("firing_rate", "margin")]
    answer = client.infer("bundle", given(client.of, x), outputs=wanted)
    assert np.array_equal(answer.as_numpy("firing_rate"), rates)
    best, second = -np.sort(-logits, axis=1)[:, :2].T
    assert np.array_equal(answer.as_numpy("margin"), best - second)
    assert answer.as_numpy("logits") is None  # not asked for
    config = told(client.get_model_config("bundle"))
    parameters = config.get("config", config)["parameters"]
    assert parameters["firing_rate_layers"]["string_value"] == ",".join(layers)


def test_classification_gives_labels_best_first(client: Any, bundle: Bundle, predictor: Predictor) -> None:
    x = images(3)
    wanted = [client.of.InferRequestedOutput("logits", class_count=3)]
    rows = client.infer("bundle", given(client.of, x), outputs=wanted).as_numpy("logits")
    assert rows.shape == (3, 3)
    logits = predictor(x)
    for row, own in zip(rows, logits, strict=True):
        parts = [text.decode().split(":") for text in row]
        assert [int(index) for _, index, _ in parts] == np.argsort(-own)[:3].tolist()
        assert [label for *_, label in parts] == [bundle.manifest.labels[i] for i in np.argsort(-own)[:3]]
        assert np.allclose([float(value) for value, *_ in parts], -np.sort(-own)[:3], atol=1e-6)
    wanted = [client.of.InferRequestedOutput("logits", class_count=99)]  # more than there are: all
    assert client.infer("bundle", given(client.of, x), outputs=wanted).as_numpy("logits").shape == (3, 10)


def test_what_the_server_says_of_itself(client: Any, bundle: Bundle) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("bundle-int8")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("bundle", "2")
    version = bundle.manifest.digest[:12]
    metadata = told(client.get_server_metadata())
    assert {"binary_tensor_data", "classification", "statistics", "model_repository"} <= set(metadata["extensions"])
    model = told(client.get_model_metadata("bundle", version))
    assert (model["name"], model["versions"]) == ("bundle", [version])
    assert [tensor["name"] for tensor in model["outputs"]] == ["logits", "margin", "firing_rate"]
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, 1, 8, 8]
    index = told(client.get_model_repository_index())
    names = [entry["name"] for entry in (index if isinstance(index, list) else index["models"])]
    assert names == ["bundle", "bundle-int8", "other"]


def test_statistics_count_what_was_done(client: Any) -> None:
    def counts() -> tuple[int, int, int]:
        (model,) = told(client.get_inference_statistics("other"))["model_stats"]
        success = model["inference_stats"]["success"]
        return int(model.get("inference_count", 0)), int(success.get("count", 0)), int(success.get("ns", 0))

    images_before, requests_before, time_before = counts()
    client.infer("other", given(client.of, images(7)))
    images_after, requests_after, time_after = counts()
    assert (images_after - images_before, requests_after - requests_before) == (7, 1)
    assert 0 < time_after - time_before < 60e9


def test_the_id_of_a_request_comes_back(client: Any) -> None:
    answer = client.infer("bundle", given(client.of, images()), request_id="mine").get_response()
    assert (answer["id"] if isinstance(answer, dict) else answer.id) == "mine"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(algorithm: str, served: Served, predictor: Predictor) -> None:
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        x = images(3)
        options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
        answer = client.infer("bundle", given(tritonclient.http, x), **options)
    assert np.array_equal(answer.as_numpy("logits"), predictor(x))


def test_asyncio_clients(served: Served, predictor: Predictor) -> None:
    """Many at once, whose requests are computed together."""
    sent = [images(1 + i % 4, seed=i) for i in range(40)]

    async def ask(of: Any, url: str) -> list[Any]:
        async with of.InferenceServerClient(url) as client:
            calls = [client.infer("bundle", given(of, x)) for x in sent]
            return [answer.as_numpy("logits") for answer in await asyncio.gather(*calls)]

    for of, url in ((tritonclient.http.aio, f"127.0.0.1:{served.port}"), (tritonclient.grpc.aio, served.grpc)):
        answers = asyncio.run(ask(of, url))
        for x, answer in zip(sent, answers, strict=True):
            assert np.array_equal(answer, predictor(x))


def test_json_may_be_flat_or_nested(served: Served, predictor: Predictor) -> None:
    x = images(2)
    nested = request(x)
    nested["inputs"][0]["data"] = x.tolist()
    for body in (request(x), nested):
        assert np.array_equal(served.post(INFER, body).output(), predictor(x))


def test_tensors_are_binary_where_that_is_wanted_for_all(served: Served, predictor: Predictor) -> None:
    """What tritonclient asks for by default: no outputs by name, and all of them in binary form."""
    x = images(2)
    answer = served.post(INFER, request(x, parameters={"binary_data_output": True}))
    size = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.body[:size])["outputs"][0]["parameters"] == {"binary_data_size": 80}
    assert np.array_equal(np.frombuffer(answer.body[size:], "<f4").reshape(2, 10), predictor(x))


def test_what_kserves_sdk_sends(served: Served, predictor: Predictor) -> None:
    """A model's name at the top level, and null for all that is not given."""
    x = images(2)
    body = request(x, model_name="bundle", model_version=None, id=None, parameters=None, outputs=None)
    body["inputs"][0] |= {"parameters": None, "from_an_extension": [1, 2]}
    assert np.array_equal(served.post(INFER, body).output(), predictor(x))
    body["outputs"] = [{"name": "logits", "parameters": {"binary_data": None, "classification": None}, "data": None}]
    assert np.array_equal(served.post(INFER, body).output(), predictor(x))


def test_a_version_can_be_named(served: Served, bundle: Bundle) -> None:
    body, version = request(images()), bundle.manifest.digest[:12]
    assert served.post(f"/v2/models/bundle/versions/{version}/infer", body).status == 200
    refused = served.post("/v2/models/bundle/versions/2/infer", body)
    assert refused.status == 404
    assert f"has version {version}, not '2'" in refused.json()["error"]


def test_status_is_what_the_page_needs(served: Served, bundle: Bundle) -> None:
    served.post(INFER, request(images(2)))
    status = served.get("/status").json()
    assert status["server"]["ready"] is True
    model = status["models"][0]
    assert (model["name"], model["state"], model["precision"]) == ("bundle", "READY", "fp32")
    assert (model["labels"], model["input"]["shape"]) == (list(bundle.manifest.labels), [1, 8, 8])
    recent = model["recent"]
    assert recent["images_per_second"] >= recent["requests_per_second"] > 0
    assert 0 < recent["latency_ms"]["p50"] <= (recent["latency_ms"]["p99"] or 60_000)
