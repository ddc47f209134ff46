"""The command that waits for a GPU, on a CPU: it keeps what it has, whatever ends it."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ray_cluster import until

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu
import gpu_inference
import gpu_pack
import gpu_steps
import harness
from networks import CLASSES

from mpdsgr_deploy.recipe import Recipe


def test_it_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = CliRunner().invoke(gpu.main, [])
    assert done.exit_code == 2
    assert done.stderr == "error: no GPU here; run this on a machine with an NVIDIA GPU and a CUDA build of torch\n"


STANDS_IN = """
import json, subprocess, sys, time
name, out, root, device = sys.argv[1:]
def note(what, **figures):
    with open(f"{out}/{name}.jsonl", "a") as file:
        file.write(json.dumps({"what": what, **figures}) + "\\n")
note("first", ms=1.0)
if name == "kernels":
    child = subprocess.Popen(["sleep", "600"])
    open(f"{out}/child", "w").write(str(child.pid))
    time.sleep(600)
if name == "providers":
    raise RuntimeError("no such | device")
note("second", right=3)
"""


class OutOfTime(subprocess.Popen[bytes]):
    """A process whose step "kernels" is out of time as soon as it has started its child."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None or "kernels" not in self.args:
            return super().wait(timeout)
        child = Path(self.args[3], "child")
        until(lambda: child.exists() and child.read_text(), "the child")
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_each_step_keeps_what_it_found_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_steps.py").write_text(STANDS_IN)
    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu.subprocess, "Popen", OutOfTime)
    monkeypatch.setitem(gpu.STEPS, "kernels", gpu.Step(8, "cut off?"))
    result = gpu.run_steps(tmp_path / "out", "data", 1, ("kernels", "providers", "attack"), "cuda")
    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert kept["steps"] == result["steps"]
    states = {name: (step["state"], [note["what"] for note in step["notes"]]) for name, step in result["steps"].items()}
    assert states == {
        "kernels": ("cut off after 8 s", ["first"]),
        "providers": ("failed: RuntimeError: no such | device", ["first"]),
        "attack": ("done", ["first", "second"]),
    }
    assert not Path(f"/proc/{(tmp_path / 'out' / 'child').read_text()}/exe").exists(), (
        "what a step started goes with it"
    )
    table = gpu.render(kept)
    assert "| kernels | cut off? | cut off after 8 s, " in table
    assert "|  | second | right 3 |" in table
    none = gpu.run_steps(tmp_path / "none", "data", 0, ("attack",), "cuda")
    assert none["steps"]["attack"] | {"seconds": 0} == {"state": "no time was left", "seconds": 0, "notes": []}


class Notes(dict[str, dict[str, Any]]):
    def __call__(self, what: str, **figures: Any) -> None:
        self[what] = figures


def test_backends_are_timed_and_compared() -> None:
    class Wrong:
        def __call__(self, x: np.ndarray) -> np.ndarray:
            if len(x) == 3:
                raise MemoryError("too\nlarge")
            return np.zeros((len(x), CLASSES), np.float32)

    notes = Notes()
    recipe = Recipe.model_validate({"model": {"name": "vgg-small", "width": 0.1}, "encoding": {"T": 2}})
    backends = {**gpu_inference.REHEARSED, "wrong": lambda *arguments: Wrong()}
    gpu_inference.measure(notes, recipe, [1, 3], 3, backends)
    assert "needs the package tensorrt" in notes["tensorrt, fp32"]["refused"]
    for n in (1, 3):
        assert notes[f"torch, batch {n}"]["times_torch"] == 1
        assert notes[f"torch, batch {n}"]["ms"] > 0
        assert notes[f"onnxruntime-cpu, fp32, batch {n}"]["rows_differ"] == 0
        assert notes[f"onnxruntime-cpu, int8, batch {n}"]["rows_differ"] > 0
    assert notes["wrong, batch 1"]["rows_differ"] == 1
    assert notes["wrong, batch 3"] == {"refused": "too large"}


def test_the_attack_step_compares_gradients_and_broken_images(tmp_path: Path) -> None:
    gpu_steps.attack(gpu_steps.Place("attack", tmp_path, "data", "cpu"))
    notes = {note.pop("what"): note for note in map(json.loads, (tmp_path / "attack.jsonl").read_text().splitlines())}
    assert notes["digits int8: against the CPU"] == {
        **{"lost": 0, "gained": 0, "median_gradient_difference": 0.0, "largest": 0.0}
    }
    assert 0 <= notes["digits fp32: PGD-10 on CPUExecutionProvider"]["right"] < 20


def test_pieces_put_together_are_the_archive(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(25_000)
    (tmp_path / "wheel.whl").write_bytes(content)
    pieces = gpu_pack.Pieces(tmp_path, size=10_000)
    with tarfile.open(fileobj=pieces, mode="w|") as tar:
        tar.add(tmp_path / "wheel.whl", "wheels/wheel.whl")
    pieces.close_piece()
    parts = sorted(tmp_path.glob("gpu.tar.*"))
    assert [part.stat().st_size for part in parts[:-1]] == [10_000] * (len(parts) - 1)
    assert len(parts) > 2
    (tmp_path / "whole.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        member = tar.extractfile("wheels/wheel.whl")
        assert member is not None
        assert member.read() == content
