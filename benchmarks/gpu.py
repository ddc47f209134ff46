"""All that waits for a GPU, in one command of at most eight minutes: the most valuable first, each result kept at once.

    python benchmarks/gpu.py --out home --root data     on the machine with the GPU
    python benchmarks/gpu.py --mode render              the table of README.md, after home/gpu.json went to results/

Every step of gpu_steps.py is a process of its own, which is ended when its time is over. What it found until then lies
in OUT/STEP.jsonl, and after each step all of it in OUT/gpu.json: the command may be cut off at any moment.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.provenance import package_version, provenance

PACKAGES = ("cuda-core", "onnxruntime", "onnxruntime-gpu", "spikingjelly", "tensorrt", "tensorrt-rtx", "torch")


class Step(NamedTuple):
    """A function of gpu_steps.py: the seconds it gets at most, and what it asks."""

    seconds: int
    question: str


STEPS = {
    "kernels": Step(70, "do the Triton kernels find what torch finds, gradients and every surrogate included?"),
    "providers": Step(110, "does onnxruntime's CUDA provider answer and withstand attacks as the CPU does?"),
    "attack": Step(40, "does PGD through the attack graph find on CUDA what it finds on the CPU, and how fast?"),
    "training": Step(110, "how fast are a training step and PGD-7 beside SpikingJelly?"),
    "cifar10": Step(100, "does CIFAR-10 train, and go on after a kill?"),
    "inference": Step(50, "what runs VGG11 fastest, and does it answer as torch does?"),
}


@click.option("--out", type=click.Path(path_type=Path), default=Path("home"), show_default=True, help="For results.")
@click.option("--root", default="data", show_default=True, help="Where CIFAR-10 lies.")
@click.option("--minutes", default=8.0, show_default=True, help="For everything.")
@click.option("--step", "names", multiple=True, type=click.Choice([*STEPS]), help="Only this; again for more.")
def run(out: Path, root: str, minutes: float, names: tuple[str, ...]) -> dict[str, Any]:
    """Measure what waits for a GPU. Needs one."""
    import torch

    if not torch.cuda.is_available():
        click.echo("error: no GPU here; run this on a machine with an NVIDIA GPU and a CUDA build of torch", err=True)
        sys.exit(2)
    return run_steps(out, root, minutes, names or tuple(STEPS), "cuda")


def run_steps(out: Path, root: str, minutes: float, names: tuple[str, ...], device: str) -> dict[str, Any]:
    """Each step in turn; returns, and keeps in OUT/gpu.json, how each ended and what it found."""
    out.mkdir(parents=True, exist_ok=True)
    end, steps = time.monotonic() + 60 * minutes, dict[str, Any]()
    versions = {name: version for name in PACKAGES if (version := package_version(name))}
    for name in names:
        started = time.monotonic()
        seconds = min(STEPS[name].seconds if device == "cuda" else 3600, end - started)
        state = _run(name, out, root, device, seconds) if seconds > 5 else "no time was left"
        file = out / f"{name}.jsonl"
        notes = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        steps[name] = {"state": state, "seconds": round(time.monotonic() - started, 1), "notes": notes}
        click.echo(f"{name}: {state}, {len(notes)} results in {steps[name]['seconds']:.0f} s", err=True)
        result = {"steps": steps, "device": device, "versions": versions}
        write_atomic(out / "gpu.json", json.dumps({**result, "provenance": provenance()}, indent=1).encode())
    return result


def _run(name: str, out: Path, root: str, device: str, seconds: float) -> str:
    """Run a step with all that it starts, for so long; returns how it ended."""
    (out / f"{name}.jsonl").unlink(missing_ok=True)
    command = [sys.executable, harness.FOLDER / "gpu_steps.py", name, out, root, device]
    with (out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code is None:
        return f"cut off after {seconds:.0f} s"
    lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return "done" if code == 0 else f"failed: {lines[-1][:200] if lines else code}"


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table: a row for each figure, and how each step ended."""
    rows = []
    for name, step in result["steps"].items():
        rows.append([name, STEPS[name].question, f"{step['state']}, {step['seconds']:.0f} s"])
        for note in step["notes"]:
            figures = ", ".join(f"{k.replace('_', ' ')} {_figure(v)}" for k, v in note.items() if k != "what")
            rows.append(["", note["what"], figures])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return harness.table(["step", "what", "result"], rows, f"{versions}.", harness.source(result))


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


main = harness.command("gpu", run, render)

if __name__ == "__main__":
    main()
