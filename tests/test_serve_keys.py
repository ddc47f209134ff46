"""Who is let in by their API key, and what a server says to everybody else."""

import hmac
import json
from pathlib import Path

import grpc
import pytest
from conftest import assert_input_error, mpdsgr_here
from door import ALICE, BOB, CAROL, KEYS, keys, refused
from served import BUNDLE, INFER, Reply, Served, eventually, images, request
from served_clients import asked
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving import security
from mpdsgr_deploy.serving.grpc_methods import METHODS
from mpdsgr_deploy.serving.security import ApiKeys

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
                    message = asked(1, "bundle") if name == "ModelInfer" else getattr(pb, f"{name}Request")()
                    if name in ("ServerLive", "ServerReady"):
                        assert ask_grpc(message, metadata=metadata)
                        continue
                    with pytest.raises(grpc.RpcError) as refused:
                        ask_grpc(message, metadata=metadata)
                    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
            assert (
                stub.ModelInfer(asked(1, "bundle"), metadata=[("authorization", f"Bearer {ALICE}")]).model_name
                == "bundle"
            )

        keys.write_text(f"{CAROL}\n")
        assert eventually(lambda: ask("POST", INFER, CAROL).status == 200)
        assert ask("POST", INFER, ALICE).status == 401
    told = json.dumps(served.lines)
    assert not [key for key in (ALICE, BOB, CAROL) if key in told], "a key is in the log"


def get(path: str, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()
