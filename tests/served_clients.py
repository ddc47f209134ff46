"""Clients that hammer a real server and write down what they saw."""

import shutil
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from conftest import resealed
from numpy.typing import NDArray
from served import BUNDLE, INFER, Served, eventually, http, images, request
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.runtime import OnnxRuntime

OTHER = "/v2/models/other"


def messages(served: Served) -> list[str]:
    return [line["message"] for line in served.lines]


def answers(served: Served) -> bool:
    with suppress(OSError):
        return served.get("/v2/health/live").status == 200
    return False


def mismatched(out: Path) -> Path:
    """A sealed bundle whose golden logits are another network's."""
    shutil.copytree(BUNDLE, out)
    with np.load(out / "golden.npz") as golden:
        content = dict(golden)
    np.savez(out / "golden.npz", **{**content, "fp32": -content["fp32"]})
    return resealed(out)


def placed(directory: Path, bundle: Path) -> None:
    """Let the link `directory` show another bundle, at one moment, as a careful operator does."""
    link = directory.with_name("next")
    link.symlink_to(bundle)
    link.rename(directory)


class Tale(NamedTuple):
    """What a client saw of one request: an answer's code, or `refused` or `closed` before one byte of it came."""

    id: str
    code: str
    version: str = ""
    logits: NDArray[np.float32] | None = None


def assert_all_answered(served: Served, tales: list[Tale]) -> None:
    """The log has a line for each request that the server took: each of them got its answer, and no other did."""
    accepted = {line["request_id"]: line["code"].replace("OK", "200") for line in served.lines if "code" in line}
    mine = {key: code for key, code in accepted.items() if key.startswith(("http-", "grpc-"))}
    assert mine.items() <= {tale.id: tale.code for tale in tales}.items()
    assert {tale.id for tale in tales if tale.code == "200"} <= mine.keys()


class Clients:
    """Clients that ask one request after the other, on connections kept alive, until told to stop.

    Over gRPC where `over` says so. They give up once nobody listens any more.
    """

    def __init__(self, served: Served, over: list[str]) -> None:
        self.served, self.x = served, images()
        self.tales: list[list[Tale]] = [[] for _ in over]
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=getattr(self, f"_{name}"), args=(f"{name}-{i}", self.tales[i]))
            for i, name in enumerate(over)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    @property
    def all(self) -> list[Tale]:
        return [tale for tales in self.tales for tale in tales]

    def seen(self, more: int) -> bool:
        """Wait until each client that goes on has so many further answers."""
        before = list(map(len, self.tales))
        return eventually(
            lambda: all(
                len(tales) >= known + more or not thread.is_alive()
                for tales, known, thread in zip(self.tales, before, self._threads, strict=True)
            ),
            60,
        )

    def _http(self, name: str, tales: list[Tale]) -> None:
        connection = None
        for number in count():
            told = f"{name}-{number}"
            if self._over.is_set():
                break
            try:
                connection = connection or self.served.connect()
            except OSError:
                tales.append(Tale(told, "refused"))
                break
            try:
                connection.socket.sendall(http("POST", INFER, request(self.x), {"X-Request-Id": told}))
                reply = connection.reply()
            except ConnectionError:  # an answer that is cut raises something else
                tales.append(Tale(told, "closed"))
                connection.close()
                connection = None
                continue
            assert reply.headers["x-request-id"] == told
            if reply.status == 200:
                tales.append(Tale(told, "200", reply.json()["model_version"], reply.output()))
            else:
                tales.append(Tale(told, str(reply.status)))
            if reply.headers.get("connection") == "close":
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def _grpc(self, name: str, tales: list[Tale]) -> None:
        with grpc.insecure_channel(self.served.grpc) as channel:
            ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            for number in count():
                told = f"{name}-{number}"
                if self._over.is_set():
                    break
                try:
                    reply = ask(asked(1, "bundle"), metadata=[("x-request-id", told)], timeout=60)
                except grpc.RpcError as error:
                    tales.append(Tale(told, error.code().name))
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        break
                    continue
                logits = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(1, -1)
                tales.append(Tale(told, "200", reply.model_version, logits))


def right(bundle: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with OnnxRuntime(bundle / "model.fp32.onnx") as network:
        return network(x)


def asked(count: int, model: str, seed: int = 0) -> Any:
    """A request over gRPC."""
    x = images(count, seed)
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="images", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    return message
