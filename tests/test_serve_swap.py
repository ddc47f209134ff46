"""Another version of a bundle takes over under load, or does not because it is a bad one."""

import asyncio
import gc
import shutil
import signal
import weakref
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from asgi import Client, started
from conftest import perturbed, resealed
from served import BUNDLE, INFER, VERSION, Served, eventually, http, images, request
from served_clients import OTHER, Clients, mismatched, placed, right
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import MpdsgrError
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.serving import served_model
from mpdsgr_deploy.serving.group import Group
from mpdsgr_deploy.serving.repository import Repository
from mpdsgr_deploy.serving.settings import Limits
from mpdsgr_deploy.serving.source import sources


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BUNDLE with other weights, golden batch and all."""
    return perturbed(open_bundle(BUNDLE), tmp_path_factory.mktemp("second") / "bundle")


@pytest.fixture(scope="module")
def newer(second: Path) -> str:
    """The version that `second` is served as."""
    return open_bundle(second).manifest.digest[:12]


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """A link to BUNDLE that tests turn to others."""
    link = tmp_path / "bundle"
    placed(link, BUNDLE)
    return link


def garbled(out: Path) -> Path:
    """One byte of the network is another."""
    shutil.copytree(BUNDLE, out)
    content = bytearray((out / "model.fp32.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "model.fp32.onnx").write_bytes(content)
    return out


def no_network(out: Path) -> Path:
    """The network's file is none, and the hashes are its own."""
    shutil.copytree(BUNDLE, out)
    (out / "model.fp32.onnx").write_bytes(b"no network at all")
    return resealed(out)


def absent(out: Path) -> Path:
    return out


def version(served: Served) -> str:
    return str(served.get("/status").json()["models"][0]["version"])


class TestHotSwap:
    def test_another_version_takes_over_under_load_and_no_request_fails(
        self, current: Path, second: Path, newer: str
    ) -> None:
        with Served(current, "--repository-control") as served:
            x = images()
            logits = {VERSION: served.post(INFER, request(x)).output()}
            with Clients(served, ["http"] * 3 + ["grpc"] * 2) as clients:
                assert clients.seen(3)
                placed(current, second)
                served.signal(signal.SIGHUP)
                assert eventually(lambda: version(served) == newer)
                assert clients.seen(3)
                placed(current, BUNDLE)
                load = served.post("/v2/repository/models/bundle/load", b"")
                assert load.status == 200
                assert clients.seen(3)
            logits[newer] = right(second, x)
            assert np.abs(logits[VERSION] - logits[newer]).max() > 0.01
            for tales in clients.tales:
                assert {tale.code for tale in tales} == {"200"}
                versions = [version for version, _ in groupby(tale.version for tale in tales)]
                assert versions == [VERSION, newer, VERSION], "an old version answered after a newer one"
                for tale in tales:
                    np.testing.assert_allclose(tale.logits, logits[tale.version], atol=1e-4)
            assert served.get("/v2/models/bundle").json()["versions"] == [VERSION]
            assert served.get(f"/v2/models/bundle/versions/{newer}").status == 404

    @pytest.mark.parametrize("change", ["replaced", "rewritten in place", "deleted"])
    def test_what_happens_on_disk_changes_nothing_that_is_served(
        self, tmp_path: Path, second: Path, change: str
    ) -> None:
        place = tmp_path / "bundle"
        shutil.copytree(BUNDLE, place)

        async def test() -> None:
            async with started(place) as server:
                if change == "deleted":
                    shutil.rmtree(place)
                elif change == "replaced":
                    place.rename(tmp_path / "old")
                    shutil.copytree(second, place)
                else:
                    for file in filter(Path.is_file, second.rglob("*")):
                        (place / file.relative_to(second)).write_bytes(file.read_bytes())
                x, client = images(3), Client(server)
                both = [{"name": "logits"}, {"name": "firing_rate"}]
                for outputs in ([{"name": "logits"}], both):
                    answer = await client.post(INFER, request(x, outputs=outputs))
                    assert answer.status == 200, answer.body
                    told = answer.json()
                    assert told["model_version"] == VERSION
                    logits = np.array(told["outputs"][0]["data"]).reshape(3, -1)
                    np.testing.assert_allclose(logits, right(BUNDLE, x), atol=1e-5)

        asyncio.run(test())

    def test_a_bundle_that_changes_while_it_is_opened_is_refused(
        self, tmp_path: Path, second: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "bundle"
        shutil.copytree(BUNDLE, place)

        def swap(*arguments: Any) -> Any:
            shutil.rmtree(place)
            shutil.copytree(second, place)
            return open_predictor(*arguments)

        monkeypatch.setattr(served_model, "open_predictor", swap)

        async def test() -> None:
            async with started(place):
                pytest.fail("it serves")

        with pytest.raises(MpdsgrError, match=r"changed while it was being opened|golden"):
            asyncio.run(test())

    def test_a_later_version_keeps_the_settings_measured_for_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A measurement beside live traffic would say little. Other processes see that a network is being opened."""
        measured, group, opening = [RuntimeSettings(threads=1, chunk=4)], Group(), list[int]()

        def measure(*_: Any) -> RuntimeSettings:
            opening.append(group.own.opening)
            return measured.pop()

        monkeypatch.setattr(served_model, "measured_at_start", measure)
        repository = Repository(sources([f"bundle={BUNDLE}"]), "onnxruntime-cpu", Limits(), 1, group)

        async def load_twice() -> None:
            for _ in range(2):
                await repository.load("bundle")
                predictor = repository.model("bundle")._predictor
                assert predictor._chunk == 4
            await repository.close()

        asyncio.run(load_twice())
        assert not measured
        assert (opening, group.own.opening) == ([1], 0)

    def test_a_bundle_that_is_as_it_was_is_not_loaded_again(self, current: Path, second: Path, newer: str) -> None:
        with Served(current, f"other={BUNDLE}") as served:
            placed(current, second)
            served.signal(signal.SIGHUP)
            assert eventually(lambda: version(served) == newer)
            assert served.get("/v2/models/other").json()["versions"] == [VERSION]

    def test_a_bad_version_leaves_the_old_one_serving_and_says_why(
        self, tmp_path: Path, current: Path, second: Path, newer: str
    ) -> None:
        with Served(current, "--repository-control") as served:
            before = served.post(INFER, request(images())).output()
            for spoilt, reason in (
                (garbled, "model.fp32.onnx"),
                (no_network, "model.fp32.onnx"),
                (mismatched, "golden batch"),
                (absent, "bundle"),
            ):
                placed(current, spoilt(tmp_path / spoilt.__name__))
                load = served.post("/v2/repository/models/bundle/load", b"")
                assert load.status == 400
                assert reason in load.json()["error"]
                (listed,) = served.post("/v2/repository/index", b"").json()
                assert (listed["version"], listed["state"]) == (VERSION, "READY")
                assert listed["reason"].startswith("the last load failed: ")
                assert reason in listed["reason"]
                assert served.get("/status").json()["models"][0]["reason"] == listed["reason"]
                known = len(served.lines)
                served.signal(signal.SIGHUP)
                if spoilt is not garbled:  # its manifest is BUNDLE's own, so nothing has changed
                    assert eventually(partial(logged, served, known, reason))
                assert served.get("/v2/health/ready").status == 200
                np.testing.assert_array_equal(served.post(INFER, request(images())).output(), before)
            placed(current, second)
            served.signal(signal.SIGHUP)
            assert eventually(lambda: version(served) == newer)
            assert served.get("/status").json()["models"][0]["reason"] == ""

    def test_unload_and_load(self, current: Path, tmp_path: Path) -> None:
        with Served(current, f"other={BUNDLE}", "--repository-control") as served:
            assert served.post("/v2/repository/models/other/unload", b"").status == 200
            assert served.get("/v2/health/ready").status == 200, "it was wanted so"
            assert served.post(f"{OTHER}/infer", request(images())).status == 404
            assert served.get(f"{OTHER}/ready").status in (404, 503)
            index = {entry["name"]: entry for entry in served.post("/v2/repository/index", b"").json()}
            assert (index["other"]["state"], index["other"]["reason"]) == ("UNAVAILABLE", "unloaded")
            assert [entry["name"] for entry in served.post("/v2/repository/index", {"ready": True}).json()] == [
                "bundle"
            ]
            assert served.post(INFER, request(images())).status == 200
            assert served.post("/v2/repository/models/bundle/unload", b"").status == 200
            placed(current, mismatched(tmp_path / "wrong"))
            assert served.post("/v2/repository/models/bundle/load", b"").status == 400
            assert served.get("/v2/health/ready").status == 200, "what was unloaded makes nobody wait"
            assert served.post("/v2/repository/models/other/load", b"").status == 200
            assert served.get(OTHER).json()["versions"] == [VERSION]
            assert served.post(f"{OTHER}/infer", request(images())).status == 200
            assert served.post("/v2/repository/models/nobody/load", b"").status == 404
            assert served.post("/v2/repository/models/nobody/unload", b"").status == 404

    def test_a_request_whose_body_comes_slowly_is_answered_by_the_version_that_is_there_then(
        self, current: Path, second: Path, newer: str
    ) -> None:
        with Served(current, "--repository-control") as served, served.connect() as connection:
            message = http("POST", INFER, request(images()))
            connection.send(message[:-10])
            assert eventually(lambda: served.counted("mpdsgr_in_flight_bytes") > 0)
            placed(current, second)
            assert served.post("/v2/repository/models/bundle/load", b"").status == 200
            assert served.post(INFER, request(images())).json()["model_version"] == newer
            connection.send(message[-10:])
            reply = connection.reply()
            assert reply.status == 200, reply
            assert reply.json()["model_version"] == newer

    def test_models_are_not_loaded_by_request_unless_that_is_wanted(self) -> None:
        with Served() as served:
            for action in ("load", "unload"):
                assert served.post(f"/v2/repository/models/bundle/{action}", b"").status == 403
            with grpc.insecure_channel(served.grpc) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                for ask, asked in (
                    (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="bundle")),
                    (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="bundle")),
                ):
                    with pytest.raises(grpc.RpcError) as refused:
                        ask(asked)
                    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert served.post(INFER, request(images())).json()["model_version"] == VERSION

    def test_the_old_version_is_freed_at_once(self, current: Path, second: Path, newer: str) -> None:
        """Without a garbage collection."""

        async def test() -> None:
            async with started(current) as server:
                gc.disable()
                old = weakref.ref(server.repository.model("bundle"))
                asked = request(images(), outputs=[{"name": "firing_rate"}])
                assert (await Client(server).post(INFER, asked)).status == 200
                placed(current, second)
                await server.repository.reload_changed()
                assert server.repository.model("bundle").version == newer
                async with asyncio.timeout(60):
                    while old() is not None:
                        await asyncio.sleep(0.01)

        try:
            asyncio.run(test())
        finally:
            gc.enable()


def logged(served: Served, known: int, reason: str) -> bool:
    """Whether an error behind the first `known` lines of the log says so."""
    return any(reason in line["message"] and line["level"] == "error" for line in served.lines[known:])
