"""TensorRT engines in a Triton model repository: which are taken, for which GPU, and what is refused."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import assert_input_error, mpdsgr_here
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from mpdsgr_deploy.bundle import Bundle, Prepared, open_bundle
from mpdsgr_deploy.serving.deploy.triton import write_repository
from mpdsgr_deploy.serving.deploy.triton_config import CONFIG
from mpdsgr_deploy.serving.source import choose_models


@pytest.fixture
def built(precise: Bundle, tmp_path: Path) -> "Engines":
    return Engines(shutil.copytree(precise.path, tmp_path / "net"))


class Engines:
    """A bundle to which engines can be added: made-up bytes, since nothing here runs them."""

    def __init__(self, path: Path) -> None:
        self.bundle = open_bundle(path)

    def add(self, gpu: str, capability: str, batch: tuple[int, int, int], tensorrt: str = "10.16.1") -> bytes:
        content = hashlib.sha256(f"{gpu} {batch} {tensorrt}".encode()).digest()
        machine = {"gpu": gpu, "compute_capability": capability, "tensorrt": tensorrt}
        sha = self.bundle.model_sha256("int8")
        engine = Prepared(backend="tensorrt", precision="int8", model_sha256=sha, machine=machine, batch=batch)
        self.bundle = self.bundle.add(engine, content)
        return content

    def deploy(self, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
        command = ("deploy", "triton", f"{self.bundle.path}@int8", "--backend", "tensorrt")
        return mpdsgr_here(*command, "--out", out, *options)


def read(directory: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((directory / CONFIG).read_text(), model_config_pb2.ModelConfig())


def test_an_engine_keeps_its_batch_profile(built: Engines, tmp_path: Path) -> None:
    built.add("NVIDIA H100", "9.0", (8, 16, 256))
    engine = built.add("NVIDIA H100", "9.0", (1, 16, 64))  # takes single images, so it is preferred
    done = built.deploy(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("net-int8: int8, TensorRT 10.16.1 for 9.0, batches up to 64\n")
    config = read(tmp_path / "out" / "net-int8")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 64)
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    assert list(config.instance_group[0].gpus) == [0]
    assert [sample.batch_size for sample in config.model_warmup] == [1, 16]
    assert (tmp_path / "out" / "net-int8" / "1" / "model.plan").read_bytes() == engine
    assert not config.cc_model_filenames


def test_engines_of_several_gpus_go_by_compute_capability(built: Engines, tmp_path: Path) -> None:
    wanted = {"8.0": built.add("NVIDIA A100", "8.0", (1, 32, 64)), "9.0": built.add("NVIDIA H100", "9.0", (1, 16, 128))}
    built.add("NVIDIA L4", "8.9", (1, 16, 128), tensorrt="10.9.0")  # older than 10.16: a server has one TensorRT
    done = built.deploy(tmp_path / "out", "--gpus", 4)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "out" / "net-int8"
    config = read(directory)
    found = {key: (directory / "1" / name).read_bytes() for key, name in config.cc_model_filenames.items()}
    assert found == wanted
    assert config.max_batch_size == 64
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    assert list(config.instance_group[0].gpus) == [0, 1, 2, 3]


def test_engines_that_triton_cannot_serve_are_refused(built: Engines, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_input_error(built.deploy(out), "holds no TensorRT engine of int8", "mpdsgr build", "--backend tensorrt")
    built.add("NVIDIA H100", "9.0", (8, 16, 64))
    assert_input_error(built.deploy(out), "takes no batches below 8", "--batch 1,16,64")
    assert_input_error(built.deploy(out, "--gpus", 0), "run only on GPUs", "--gpus")
    built.add("NVIDIA H200", "9.0", (1, 16, 64))
    assert_input_error(built.deploy(out), "NVIDIA H100 and NVIDIA H200", "9.0")
    assert not out.exists()


def test_onnx_takes_as_large_batches_as_the_engine_does(built: Engines, tmp_path: Path) -> None:
    built.add("NVIDIA H100", "9.0", (1, 16, 48))
    write_repository(choose_models([str(built.bundle.path), f"{built.bundle.path}@int8"]), tmp_path / "out")
    assert read(tmp_path / "out" / "net-int8").max_batch_size == 48
    assert read(tmp_path / "out" / "net").max_batch_size == 128
