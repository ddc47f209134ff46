"""Who is let in, how they know whom they talk to, and what a request can never reach."""

import asyncio
import hmac
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from asgi import Client, started
from conftest import assert_input_error, mpdsgr_here
from served import BUNDLE, INFER, Reply, Served, eventually, images, request
from served import http as message
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving import security
from mpdsgr_deploy.serving.grpc import Grpc
from mpdsgr_deploy.serving.grpc_methods import METHODS
from mpdsgr_deploy.serving.security import ApiKeys, check_exposure

ALICE, BOB, CAROL = "alice-0123456789abcdef", "bob-0123456789abcdef", "carol-0123456789abcdef"
KEYS = f"# who may ask\n{ALICE}\n\n  {BOB}  \n# {CAROL}\n"
OPEN = ("/", "/v2/health/live", "/v2/health/ready")
CLOSED = (
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("GET", "/v2"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/bundle"),
    ("GET", "/v2/models/bundle/ready"),
    ("GET", "/v2/models/bundle/config"),
    ("GET", "/v2/models/bundle/stats"),
    ("POST", INFER),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/bundle/load"),
    ("GET", "/nothing"),
    ("GET", "/v2/health/live/../../../status"),
)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.txt"
    file.write_text(KEYS)
    return file


class TestKeys:
    @pytest.mark.parametrize(
        ("authorization", "accepted"),
        [
            (f"Bearer {ALICE}", True),
            (f"bearer {BOB}", True),
            (f"Bearer  {BOB} ", True),
            (f"Bearer {CAROL}", False),
            (f"Bearer # {CAROL}", False),
            (f"Bearer {ALICE}x", False),
            (f"Bearer {ALICE[:-1]}", False),
            (f"Bearer {ALICE} {BOB}", False),
            (f"Basic {ALICE}", False),
            (ALICE, False),
            ("Bearer", False),
            ("Bearer ", False),
            ("", False),
            ("Bearer \u00e9\u00ff", False),
        ],
    )
    def test_who_is_let_in(self, keys: Path, authorization: str, accepted: bool) -> None:
        assert ApiKeys(keys).accepts(authorization) == accepted

    def test_a_wrong_key_is_compared_with_every_key_and_a_right_one_too(
        self, keys: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append(len(one) == len(other))
            return hmac.compare_digest(one, other)

        known = ApiKeys(keys)
        monkeypatch.setattr(security, "hmac", type("", (), {"compare_digest": staticmethod(compare)}))
        for key in (ALICE, BOB, "x"):
            compared.clear()
            known.accepts(f"Bearer {key}")
            assert compared == [True, True]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"# none\n",
            b"short\n",
            f"{ALICE}\nshort\n".encode(),
            f"{ALICE} # whose\n".encode(),  # no client could send it
            "\u00e9".encode() * 20,
            b"\xff\xfe" * 20,
        ],
    )
    def test_a_file_without_proper_keys_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "keys").write_bytes(content)
        with pytest.raises(InputError, match="keys"):
            ApiKeys(tmp_path / "keys")

    @pytest.mark.usefixtures("loggers")
    def test_no_file_is_refused(self, tmp_path: Path) -> None:
        assert_input_error(mpdsgr_here("serve", BUNDLE, "--api-key-file", tmp_path / "none"), "none")

    def test_a_file_that_changed_is_read_again_and_a_bad_one_lets_nobody_in(
        self, keys: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(security, "CHECK_EVERY", 0.0)
        known = ApiKeys(keys)
        keys.write_text(f"{CAROL}\n")
        assert known.accepts(f"Bearer {CAROL}")
        assert not known.accepts(f"Bearer {ALICE}")
        for spoil in (lambda: keys.write_text("short\n"), lambda: keys.write_text(""), keys.unlink):
            spoil()
            for key in (ALICE, BOB, CAROL, "short", ""):
                assert not known.accepts(f"Bearer {key}")
            keys.write_text(f"{CAROL}\n")
            assert known.accepts(f"Bearer {CAROL}")
        keys.write_text(KEYS)
        assert known.accepts(f"Bearer {ALICE}")
        assert not known.accepts(f"Bearer {CAROL}")


def test_without_a_key_a_server_says_whether_it_is_ready_and_nothing_else(keys: Path) -> None:
    with Served(BUNDLE, "--api-key-file", keys, "--repository-control") as served:

        def ask(method: str, path: str, key: str | None) -> Reply:
            told = {} if key is None else {"Authorization": f"Bearer {key}"}
            body = request(images()) if path == INFER else {}
            return served.post(path, body, told) if method == "POST" else served.ask(get(path, told))

        for path in OPEN:
            assert ask("GET", path, None).status == 200
        for key in (None, CAROL, "x" * 5000):
            for method, path in CLOSED:
                refused = ask(method, path, key)
                assert refused.status == 401, (path, refused)
                assert refused.headers["www-authenticate"] == 'Bearer realm="mpdsgr"'
                assert "bundle" not in refused.body.decode()
        assert ask("POST", INFER, ALICE).status == ask("GET", "/metrics", BOB).status == 200

        with grpc.insecure_channel(served.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for metadata in ([], [("authorization", f"Bearer {CAROL}")]):
                for name in METHODS:
                    ask_grpc = getattr(stub, name)
                    message = call() if name == "ModelInfer" else getattr(pb, f"{name}Request")()
                    if name in ("ServerLive", "ServerReady"):
                        assert ask_grpc(message, metadata=metadata)
                        continue
                    with pytest.raises(grpc.RpcError) as refused:
                        ask_grpc(message, metadata=metadata)
                    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
            assert stub.ModelInfer(call(), metadata=[("authorization", f"Bearer {ALICE}")]).model_name == "bundle"

        keys.write_text(f"{CAROL}\n")
        assert eventually(lambda: ask("POST", INFER, CAROL).status == 200)
        assert ask("POST", INFER, ALICE).status == 401
    told = json.dumps(served.lines)
    assert not [key for key in (ALICE, BOB, CAROL) if key in told], "a key is in the log"


def get(path: str, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()


def call() -> Any:
    x = images()
    message = pb.ModelInferRequest(model_name="bundle")
    message.inputs.add(name="images", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    return message


class Pair(NamedTuple):
    """PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A throw-away certificate authority."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.own = self.issue("authority", None)

    def issue(self, name: str, by: Pair | None, *more: str) -> Pair:
        pair = Pair(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(pair.certificate)]
        if by is not None:
            command += ["-CA", str(by.certificate), "-CAkey", str(by.key), "-addext", "basicConstraints=CA:FALSE"]
        subprocess.run([*command, *more], check=True, capture_output=True)
        return pair

    def server(self) -> Pair:
        return self.issue("server", self.own, "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")

    def client(self) -> Pair:
        return self.issue("client", self.own)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "strange")


def https(served: Served, trusted: Authority, pair: Pair | None = None, path: str = "/v2/health/ready") -> int:
    """The status that a client gets who believes an authority and shows a certificate, or none."""
    context = ssl.create_default_context(cafile=trusted.own.certificate)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    connection = http.client.HTTPSConnection("127.0.0.1", served.port, context=context, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def over_grpc(served: Served, trusted: Authority, pair: Pair | None = None) -> str:
    """The same over gRPC: the model that answers an inference."""
    shown = (None, None) if pair is None else (pair.key.read_bytes(), pair.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(trusted.own.certificate.read_bytes(), *shown)
    with grpc.secure_channel(served.grpc, credentials) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(call(), timeout=60)
    return str(answer.model_name)


def refused(ask: Callable[[], object]) -> bool:
    """Whether no connection comes about."""
    try:
        ask()
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
        return True
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    return False


def was_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection on which nothing was sent."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


class TestTls:
    def test_a_server_shows_its_certificate_and_speaks_no_clear_text(
        self, authority: Authority, stranger: Authority, keys: Path
    ) -> None:
        pair = authority.server()
        with Served(
            BUNDLE, "--tls-certificate", pair.certificate, "--tls-key", pair.key, "--api-key-file", keys
        ) as served:
            assert any("https://" in line["message"] for line in served.lines)
            assert https(served, authority) == 200
            assert https(served, authority, path="/status") == 401
            assert refused(lambda: https(served, stranger))
            with pytest.raises(grpc.RpcError) as keyless:
                over_grpc(served, authority)
            assert keyless.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert refused(lambda: over_grpc(served, stranger))
            with pytest.raises((ConnectionError, TimeoutError)):
                served.get("/v2/health/live")
            with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError):
                service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=60)
            assert https(served, authority) == 200

    def test_with_a_client_authority_nobody_is_let_in_without_its_certificate(
        self, authority: Authority, stranger: Authority
    ) -> None:
        pair, client, strange = authority.server(), authority.client(), stranger.client()
        told = ["--tls-certificate", pair.certificate, "--tls-key", pair.key]
        with Served(BUNDLE, *told, "--tls-client-ca", authority.own.certificate, "--host", "0.0.0.0") as served:
            assert https(served, authority, client, "/status") == 200
            assert over_grpc(served, authority, client) == "bundle"
            for shown in (None, strange):
                assert refused(lambda shown=shown: https(served, authority, shown))
                assert refused(lambda shown=shown: over_grpc(served, authority, shown))
            assert https(served, authority, client, "/metrics") == 200

    def test_a_renewed_certificate_is_shown_and_a_stop_waits_for_no_idle_client(
        self, authority: Authority, tmp_path: Path
    ) -> None:
        def subject(port: int) -> str:
            context = ssl.create_default_context(cafile=authority.own.certificate)
            with socket.create_connection(("127.0.0.1", port), 10) as plain:
                context.set_alpn_protocols(["h2"])
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
                    return str(wrapped.getpeercert()["serialNumber"])  # type: ignore[index]

        def place(pair: Pair) -> None:
            shutil.copy(pair.certificate, certificate)
            shutil.copy(pair.key, key)

        certificate, key = tmp_path / "certificate", tmp_path / "key"
        place(authority.server())
        told = ["--tls-certificate", certificate, "--tls-key", key]
        with Served(BUNDLE, *told, limits={"header_seconds": 2, "connections": 3, "drain_seconds": 600}) as served:
            before = [subject(served.port), subject(served.grpc_port)]
            assert before[0] == before[1]
            place(authority.server())
            served.signal(signal.SIGHUP)
            assert eventually(lambda: subject(served.port) != before[0])
            assert subject(served.grpc_port) == subject(served.port)
            key.write_text("no key")
            served.signal(signal.SIGHUP)
            assert eventually(lambda: any("the certificate read before stays" in x["message"] for x in served.lines))
            assert subject(served.grpc_port) == subject(served.port) != before[0]
            with ExitStack() as stack:
                many = [  # without a handshake
                    stack.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(60)
                ]
                assert eventually(lambda: sum(map(was_closed, many)) >= 57)  # those above the limit at once
                assert served.descriptors() < 60
                assert eventually(lambda: not refused(lambda: https(served, authority)))
            assert eventually(lambda: not refused(lambda: https(served, authority)))  # those 60 have been seen to leave
            context = ssl.create_default_context(cafile=authority.own.certificate)
            with (
                socket.create_connection(("127.0.0.1", served.port)) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1"),
            ):
                assert served.stop() == 0

    @pytest.mark.usefixtures("loggers")
    def test_files_that_make_no_tls_server_end_with_one_line(self, authority: Authority, tmp_path: Path) -> None:
        pair, other = authority.server(), authority.client()
        (tmp_path / "text").write_text("no certificate")
        ends = ["--port", 0, "--grpc-port", 0]
        for certificate, key in (
            (pair.certificate, other.key),
            (tmp_path / "text", pair.key),
            (tmp_path / "none", pair.key),
        ):
            done = mpdsgr_here("serve", BUNDLE, *ends, "--tls-certificate", certificate, "--tls-key", key)
            assert_input_error(done, "no TLS with", str(certificate))
        both = ["--tls-certificate", pair.certificate, "--tls-key", pair.key]
        done = mpdsgr_here("serve", BUNDLE, *ends, *both, "--tls-client-ca", tmp_path / "text")
        assert_input_error(done, str(tmp_path / "text"))
        for half in (both[:2], both[2:], ["--tls-client-ca", pair.certificate]):
            assert_input_error(mpdsgr_here("serve", BUNDLE, *ends, *half), "belong together")


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
            listening = await Grpc.start(server, "127.0.0.1", 0, None)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

                async def ask_all() -> list[int]:
                    codes = [
                        (await client.ask(m, p, body, **headers)).status
                        for m, p, body, headers in hostile_requests(planted)
                    ]
                    for name in ("../planted", str(planted)):
                        message = call()
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
