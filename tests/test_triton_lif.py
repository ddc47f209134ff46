"""The GPU's kernels without a GPU: run by Triton's interpreter, and compiled for sm_90 as they would be launched."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpdsgr_deploy.snn import TdBN, multistep
from mpdsgr_deploy.snn.lif_state import LIFConstants
from mpdsgr_deploy.snn.surrogate import make_surrogate

triton = pytest.importorskip("triton")
# imported here too, so that collection sees a name it lacks
EQUALITY = pytest.importorskip("triton_equality", exc_type=ModuleNotFoundError).__file__

T, B, C = 3, 4, 32


@pytest.mark.parametrize(
    "interpret",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
    ids=["interpreter", "gpu"],
)
def test_the_kernels_find_what_torch_finds(interpret: str) -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, EQUALITY], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class Absent:
    """A GPU for Triton to compile for: an H100, under a number that no GPU has, so that no other finds its kernels."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """In place of a launch: goes as far as a launch can go without a GPU."""

    def __init__(self) -> None:
        self.ptx: dict[str, str] = {}

    def __call__(self, kernel: Any, x: Tensor, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        from mpdsgr_deploy.snn.triton_lif import OPTIONS

        compiled = kernel.warmup(*arguments, **constants, **OPTIONS, grid=grid)
        assert compiled.asm["cubin"]
        self.ptx[kernel.__name__] = compiled.asm["ptx"]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    from triton.runtime import driver

    from mpdsgr_deploy.snn import triton_lif

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Absent())
    compiler = Compiler()
    monkeypatch.setattr(triton_lif, "_launch", compiler)
    return compiler


@pytest.mark.parametrize(
    ("dtype", "hard", "held", "resting", "name"),
    [
        (torch.float32, True, False, True, "triangle"),
        (torch.bfloat16, False, True, False, "superspike"),
        (torch.float16, True, True, False, "rectangular"),
    ],
)
def test_neurons_compile(
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    hard: bool,
    held: bool,
    resting: bool,
    name: str,
) -> None:
    """Through `multistep_lif`, which hands GPU tensors to the kernels."""
    monkeypatch.setattr(multistep, "_on_gpu", lambda x: True)
    current = torch.zeros(1 if held else T, B, C, dtype=dtype, requires_grad=True)
    state = None if resting else (torch.zeros(B, C, dtype=dtype, requires_grad=True), torch.zeros(B, C, dtype=dtype))
    u, spikes = multistep.multistep_lif(current, state, LIFConstants(T, 0.5, 1.0, hard, make_surrogate(name)))
    (u + spikes).sum().backward()
    assert {*compiler.ptx} == {"lif_forward", "lif_backward"}
    assert "fma." not in compiler.ptx["lif_forward"]
    if dtype == torch.bfloat16:
        assert "cvt.rn.bf16" in compiler.ptx["lif_forward"]  # to nearest


@pytest.mark.parametrize(
    ("training", "order", "name"),
    [
        (True, torch.contiguous_format, "sigmoid"),
        (True, torch.channels_last, "triangle"),
        (False, torch.channels_last, "exponential"),
    ],
)
def test_neurons_behind_tdbn_compile(compiler: Compiler, training: bool, order: torch.memory_format, name: str) -> None:
    from mpdsgr_deploy.snn.triton_lif import norm_lif

    x = torch.zeros(T * B, C, 8, 8).contiguous(memory_format=order).unflatten(0, (T, B)).requires_grad_()
    norm = TdBN(C, v_threshold=1.0).train(training)
    found = norm_lif(x, norm, LIFConstants(T, 0.5, 1.0, True, make_surrogate(name)), observed=True)
    (found.spikes.sum() + found.moments.mean.sum() + found.moments.variance.sum()).backward()
    assert {*compiler.ptx} == {"lif_forward", "lif_backward"} | ({"norm_backward"} if training else set())
    assert "fma" not in compiler.ptx["lif_forward"]


def test_what_the_kernels_do_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multistep, "_on_gpu", lambda x: True)
    x, surrogate = torch.zeros(T, B), make_surrogate("triangle")
    assert multistep.gpu_kernels(x, 0.5, surrogate) is not None
    assert multistep.gpu_kernels(x.double(), 0.5, surrogate) is None
    assert multistep.gpu_kernels(x, torch.zeros(T, 1), surrogate) is None
    assert multistep.gpu_kernels(x, 0.5, surrogate._replace(parameter=None)) is None
    assert multistep.gpu_kernels(x, 0.5, surrogate._replace(name="another package's")) is None


def test_tensors_on_the_cpu_never_meet_the_kernels(compiler: Compiler) -> None:
    surrogate = make_surrogate("triangle")
    multistep.multistep_lif(torch.zeros(T, B), None, LIFConstants(T, 0.5, 1.0, True, surrogate))
    assert not compiler.ptx
