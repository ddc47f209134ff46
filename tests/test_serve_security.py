"""At which addresses a server may listen, and what a request can never reach."""

import asyncio
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from asgi import Client, started
from conftest import assert_input_error, mpdsgr_here
from door import Authority, authority
from served import BUNDLE, INFER, Served, images, request
from served import http as message
from served_clients import asked
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.grpc import start_grpc
from mpdsgr_deploy.serving.security import check_exposure


class TestExposure:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "", "127.0.0.1.example.org"])
    def test_an_address_that_others_reach_needs_somebody_at_the_door(self, host: str) -> None:
        with pytest.raises(InputError, match="--insecure"):
            check_exposure(host, authenticated=False, insecure=False)
        check_exposure(host, authenticated=True, insecure=False)
        check_exposure(host, authenticated=False, insecure=True)

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
    def test_this_machine_alone_needs_nobody(self, host: str) -> None:
        check_exposure(host, authenticated=False, insecure=False)

    @pytest.mark.usefixtures("loggers")
    def test_the_command_refuses_and_tls_alone_does_not_help(self, authority: Authority) -> None:
        pair = authority.server()
        tls = ["--tls-certificate", pair.certificate, "--tls-key", pair.key]
        for more in ([], tls):
            done = mpdsgr_here("serve", BUNDLE, "--host", "0.0.0.0", "--port", 0, "--grpc-port", 0, *more)
            assert_input_error(done, "--host 0.0.0.0", "--api-key-file", "--tls-client-ca", "--insecure")

    def test_by_default_only_this_machine_reaches_it(self) -> None:
        with Served(BUNDLE) as served:
            listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            mine = {f"{served.port:04X}", f"{served.grpc_port:04X}"}
            where = {
                fields[1].partition(":")[0] for fields in listening if fields[3] == "0A" and fields[1][-4:] in mine
            }
            assert where <= {"0100007F"}
            six = [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
            where = {fields[1].partition(":")[0] for fields in six if fields[3] == "0A" and fields[1][-4:] in mine}
            assert where <= {"0000000000000000FFFF00000100007F"}


watching = False
touched: list[tuple[str, object]] = []
FILES = (
    "open",
    "os.",
    "shutil.",
    "subprocess.",
    "glob.",
    "pathlib.",
    "ctypes.",
    "import",
    "pickle.",
    "exec",
    "compile",
)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event.startswith(FILES):
        touched.append((event, arguments[:2]))


def hostile_requests(planted: Path) -> list[tuple[str, str, bytes | dict[str, Any], dict[str, str]]]:
    names = [
        str(planted),
        f"..{planted}",
        "../planted",
        "..%2fplanted",
        "%2e%2e/planted",
        "bundle/../planted",
        "bundle/../../etc/passwd",
        "bundle\0",
        "file://" + str(planted),
        "",
        ".",
        "..",
        "~",
    ]
    found: list[tuple[str, str, bytes | dict[str, Any], dict[str, str]]] = []
    for name in names:
        for end in ("", "/ready", "/config", "/stats", f"/versions/{name}", f"/versions/{name}/config"):
            found.append(("GET", f"/v2/models/{name}{end}", b"", {}))
        found.append(("POST", f"/v2/models/{name}/infer", request(images()), {}))
        found.append(("POST", f"/v2/models/bundle/versions/{name}/infer", request(images()), {}))
        for action in ("load", "unload"):
            found.append(("POST", f"/v2/repository/models/{name}/{action}", {}, {}))
        found.append(("GET", f"/{name}", b"", {}))
    config = json.dumps({"backend": "python", "default_model_filename": str(planted)})
    for parameters in ({"config": config}, {"file:1/model.onnx": "AAAA"}, {"path": str(planted)}):
        found.append(("POST", "/v2/repository/models/bundle/load", {"parameters": parameters}, {}))
    for parameters in (
        {"shared_memory_region": "/dev/shm/x", "shared_memory_byte_size": 4},
        {"binary_data_size": 2**40},
    ):
        bad = request(images())
        bad["inputs"][0]["parameters"] = parameters
        found.append(("POST", INFER, bad, {}))
    for header in ("x_request_id", "traceparent", "tracestate", "authorization", "content_type"):
        found.append(("POST", INFER, request(images(), id=str(planted)), {header: str(planted / "manifest.json")}))
    found.append(("POST", INFER, b"\x80\x04cposix\nsystem\n(S'id'\ntR.", {"content_type": "application/x-pickle"}))
    return found


def test_nothing_in_a_request_reaches_a_file(tmp_path: Path) -> None:
    served, planted = tmp_path / "bundle", tmp_path / "planted"
    for place in (served, planted):
        shutil.copytree(BUNDLE, place)
    sys.addaudithook(watch)  # for good: hooks are never taken away

    async def test() -> None:
        global watching
        async with started(served, repository_control=True) as server:
            client = Client(server)
            listening = await start_grpc(server, "127.0.0.1", 0, None)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

                async def ask_all() -> list[int]:
                    codes = [
                        (await client.ask(m, p, body, **headers)).status
                        for m, p, body, headers in hostile_requests(planted)
                    ]
                    for name in ("../planted", str(planted)):
                        message = asked(1, "bundle")
                        message.model_name = name
                        await denied(stub.ModelInfer(message))
                        await denied(stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name)))
                        load = pb.RepositoryModelLoadRequest(model_name="bundle")
                        load.parameters["file:1/model.onnx"].bytes_param = b"x"
                        await denied(stub.RepositoryModelLoad(load))
                    return codes

                await ask_all()  # what is imported at its first use is there now
                touched.clear()
                watching = True
                try:
                    codes = await ask_all()
                finally:
                    watching = False
                assert touched == []
                assert set(codes) <= {200, 400, 404, 405}
                with socket.socket():
                    watching = True
                    (served / "manifest.json").read_bytes()
                    watching = False
                assert touched, "this test sees nothing at all"
                assert [entry["name"] for entry in server.index(ready=False)] == ["bundle"]
            await listening.stop(1)

    asyncio.run(test())


async def denied(answer: Any) -> None:
    with pytest.raises(grpc.RpcError):
        await answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),  # the server's own page
        ({"Host": "evil.example:8000"}, 403),  # DNS rebinding
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
    ],
)
def test_a_loopback_server_answers_no_page_of_another_site(
    headers: dict[str, object], status: int, loopback: Served
) -> None:
    for sent in (message("GET", "/status", headers=headers), message("POST", INFER, request(images()), headers)):
        assert loopback.ask(sent).status == status


@pytest.fixture(scope="module")
def loopback() -> Iterator[Served]:
    with Served(BUNDLE) as server:
        yield server


def test_something_in_front_may_use_names_of_its_own() -> None:
    with Served(BUNDLE, "--insecure") as server:
        headers: dict[str, object] = {"Host": "models.example", "Origin": "https://models.example"}
        assert server.ask(message("GET", "/status", headers=headers)).status == 200
