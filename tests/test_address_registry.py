"""oci:// addresses: a bundle in a registry, which here is the part of the protocol that a pull needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipes import shipped

pytest.importorskip("oras.client")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A small one that comes with the package."""
    return open_bundle(shipped("export") / "doctor" / "bundle")


@pytest.fixture
def registry(bundle: Bundle) -> Iterator[str]:
    """The address of a registry that holds the bundle's files as layers, under models/digits:1."""
    files = [file for file in bundle.path.iterdir() if file.is_file()]
    blobs = {f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}": file for file in files}
    kind = "application/vnd.oci.image.layer.v1.tar"
    layers = [
        {"digest": d, "mediaType": kind, "size": 0, "annotations": {"org.opencontainers.image.title": file.name}}
        for d, file in blobs.items()
    ]
    answers = {f"/v2/models/digits/blobs/{d}": file.read_bytes() for d, file in blobs.items()}
    answers["/v2/models/digits/manifests/1"] = json.dumps({"schemaVersion": 2, "layers": layers}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answers.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_bundle_in_a_registry_is_verified_and_cached(
    registry: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPDSGR_CACHE", str(tmp_path / "cache"))
    digest = bundle.manifest.digest
    with pytest.raises(InputError, match="has no digest"):
        open_bundle(f"oci://{registry}/models/digits:1")
    with pytest.raises(InputError, match="another bundle than the address names"):
        open_bundle(f"oci://{registry}/models/digits:1@sha256:{'0' * 64}")
    with pytest.raises(InputError, match="cannot fetch oci://"):
        open_bundle(f"oci://{registry}/models/digits:2@sha256:{digest}")
    opened = open_bundle(f"oci://{registry}/models/digits:1@sha256:{digest}")
    assert opened.manifest == bundle.manifest
    assert open_bundle(f"oci://127.0.0.1:1/gone:1@sha256:{digest}").path == opened.path  # offline, from the cache
