"""TLS: how clients know whom they talk to, and a server its clients."""

import http.client
import shutil
import signal
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from conftest import assert_input_error, mpdsgr_here
from door import Authority, Pair, authority, keys, refused
from served import BUNDLE, Served, eventually
from served_clients import asked
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


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
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asked(1, "bundle"), timeout=60)
    return str(answer.model_name)


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
            assert eventually(
                lambda: any("the new TLS certificate cannot be used" in x["message"] for x in served.lines)
            )
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
            assert_input_error(done, "cannot be used", str(certificate))
        both = ["--tls-certificate", pair.certificate, "--tls-key", pair.key]
        done = mpdsgr_here("serve", BUNDLE, *ends, *both, "--tls-client-ca", tmp_path / "text")
        assert_input_error(done, str(tmp_path / "text"))
        for half in (both[:2], both[2:], ["--tls-client-ca", pair.certificate]):
            assert_input_error(mpdsgr_here("serve", BUNDLE, *ends, *half), "belong together")
