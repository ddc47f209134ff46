"""An object store on this machine: moto's S3 server over HTTP, which records what it is asked."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.request import Request as Post
from urllib.request import urlopen

import pytest
from ports import free_ports

BUCKET = "bucket"


class Request(NamedTuple):
    method: str
    path: str  # /bucket/key
    range: str | None


class ObjectStore:
    """The server's requests, and the file system of fsspec that asks it."""

    def __init__(self, fs: Any, requests: list[Request]) -> None:
        self.fs, self.requests = fs, requests
        self.refuse: int | None = None  # the status of all answers
        self._changed, self._held, self._let_through = threading.Condition(), "", 0

    def hold(self, key: str, *, after: int) -> None:
        """Let so many more writes of keys that contain `key` through; others wait until `release`."""
        with self._changed:
            self._held, self._let_through = key, after

    def release(self) -> None:
        """Let every write through."""
        with self._changed:
            self._held = ""
            self._changed.notify_all()

    def wait_for_turn(self, key: str) -> None:
        """In a request that writes: return once it is let through."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held not in key or self._let_through > 0)
            if self._held and self._held in key:
                self._let_through -= 1

    def put(self, files: dict[str, bytes]) -> None:
        """Write files by their keys."""
        for key, content in files.items():
            self.fs.pipe_file(f"{BUCKET}/{key}", content)

    def fetched(self, key: str = "") -> list[Request]:
        """The requests since the last call that fetched files whose path contains `key`."""
        seen, self.requests[:] = self.requests[:], []
        return [one for one in seen if one.method == "GET" and key in one.path and one.path.strip("/") != BUCKET]


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """The store, with an empty bucket, to which this process's environment leads and that of those it starts."""
    pytest.importorskip("moto")
    fsspec = pytest.importorskip("fsspec")
    s3fs = pytest.importorskip("s3fs")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *arguments: object) -> None: ...

    store = ObjectStore(None, requests := [])
    backend = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        requests.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
        if store.refuse:
            respond(f"{store.refuse} Refused", [("Content-Length", "0")])
            return []
        if environ["REQUEST_METHOD"] == "PUT":
            store.wait_for_turn(environ["PATH_INFO"])
        return backend(environ, respond)

    (port,) = free_ports(1)
    server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        for name, value in {
            "ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "ACCESS_KEY_ID": "key",
            "SECRET_ACCESS_KEY": "secret",
            "DEFAULT_REGION": "us-east-1",
            "EC2_METADATA_DISABLED": "true",
        }.items():
            environment.setenv(f"AWS_{name}", value)
        # an earlier store of this process left its buckets in moto, and its address in fsspec's file systems
        urlopen(Post(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem.clear_instance_cache()
        store.fs = fsspec.filesystem("s3", use_listings_cache=False)
        store.fs.mkdir(BUCKET)
        yield store
        server.shutdown()
