"""A real tritonserver for tests, on the loopback and the CPU: the binary in the wheel of nvidia-pytriton.

That wheel has no onnxruntime backend. A folder of that name with a few lines of Python stands in for it, so that a
model repository is loaded as it was written. The server, its Python and numpy 1 live in an environment of their own,
made once a machine under pytest's cache.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from ports import free_ports

PYTRITON = "0.7.0"
PATIENCE = 240.0  # seconds; it needs two, but other tests may be running
BACKEND = """
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, args):
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = [tensor.name for tensor in self.session.get_inputs()]
        feeds = {name: utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        wanted = list(request.requested_output_names())
        found = self.session.run(wanted, feeds)
        return utils.InferenceResponse([utils.Tensor(*pair) for pair in zip(wanted, found)])
"""


class Triton(NamedTuple):
    """Where it listens, as tritonclient wants it."""

    http: str
    grpc: str


def environment(cache: Path) -> Path:
    """The environment of the server, made if it is not there. Skips the test where that is not possible."""
    library = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED") or not library.is_file():
        pytest.skip("this Python has no shared libpython, which Triton's Python backend loads")
    python = "{}.{}".format(*sys.version_info)
    env = cache / f"pytriton-{PYTRITON}-onnxruntime-{version('onnxruntime')}-python-{python}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may want it at once
        if not (env / "ready").exists():
            shutil.rmtree(env, ignore_errors=True)
            venv.create(env, with_pip=False)
            pip = [sys.executable, "-m", "pip", "--python", env / "bin" / "python", "--disable-pip-version-check"]
            wanted = [f"nvidia-pytriton=={PYTRITON}", f"onnxruntime=={version('onnxruntime')}", "numpy<2"]
            wanted += ["flatbuffers", "packaging", "protobuf"]  # what these need of what they ask for
            command = [*pip, "install", "--quiet", "--no-compile", "--no-deps", "--only-binary", ":all:", *wanted]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
            if done.returncode:
                pytest.skip(f"no tritonserver can be installed here: {done.stderr.strip().splitlines()[-1]}")
            _backends(env, python)
            (env / "ready").touch()
    return env


def _backends(env: Path, python: str) -> None:
    server = _site(env) / "pytriton" / "tritonserver"
    shutil.copytree(server / "backends" / "python", env / "backends" / "python")
    stub = shutil.copy(server / "python_backend_stubs" / python / "triton_python_backend_stub", env / "backends/python")
    for program in (Path(stub), server / "bin" / "tritonserver"):
        program.chmod(0o755)
    (env / "backends" / "onnxruntime").mkdir()
    (env / "backends" / "onnxruntime" / "model.py").write_text(BACKEND)


def _site(env: Path) -> Path:
    (site,) = (env / "lib").glob("python*/site-packages")
    return site


@contextmanager
def tritonserver(env: Path, repository: Path, log: Path) -> Iterator[Triton]:
    """A server that loaded every model of a repository; fails with its log if it does not."""
    http, grpc = free_ports(2)
    libraries = [_site(env) / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PATH": f"{env / 'bin'}:{os.environ['PATH']}",  # where the Python in the backend finds its packages
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
    }
    options = {
        "model-repository": repository,
        "backend-directory": env / "backends",
        "http-address": "127.0.0.1",
        "http-port": http,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc,
        "allow-metrics": "false",
        "exit-timeout-secs": 5,
    }
    command = [_site(env) / "pytriton/tritonserver/bin/tritonserver", *(f"--{k}={v}" for k, v in options.items())]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + PATIENCE
        while process.poll() is None and not _ready(http) and time.monotonic() < end:
            time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        assert _ready(http), log.read_text()
        yield Triton(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False
