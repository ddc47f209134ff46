"""What tests of who is let in share: API keys, and an authority that issues certificates."""

import http.client
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

ALICE, BOB, CAROL = "alice-0123456789abcdef", "bob-0123456789abcdef", "carol-0123456789abcdef"
KEYS = f"# who may ask\n{ALICE}\n\n  {BOB}  \n# {CAROL}\n"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.txt"
    file.write_text(KEYS)
    return file


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


def refused(ask: Callable[[], object]) -> bool:
    """Whether no connection comes about."""
    try:
        ask()
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
        return True
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    return False
