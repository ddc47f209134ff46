"""All that must travel to a machine with a GPU and without a network, in pieces that any channel takes.

    python benchmarks/gpu_pack.py --python 3.12 --root data --out travel

writes travel/gpu.tar.000, .001, ... of at most 60 MB each: this checkout as committed, the wheels that a machine with
torch may lack (in the versions of constraints.txt), CIFAR-10 as torchvision lays it out, and run.sh. There:

    cat gpu.tar.* | tar x && sh run.sh
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import harness
from workers import PACKAGES as PEERS

TOP = harness.FOLDER.parent
PIECE = 60_000_000  # bytes
PACKAGES = (
    *("annotated-types", "array-api-compat", "click", "cuda-core", "lightning-fabric", "lightning-utilities"),
    *("ml-dtypes", "onnx", "onnx-ir", "onnxscript", "pydantic", "pydantic-core", "safetensors", "typing-inspection"),
)
PINNED = ("onnxruntime-gpu==1.31.1", *(package for package in PEERS if "snntorch" not in package))
# --target instead of an environment, so that installed packages, above all torch, do not change
RUN = """\
set -e
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target site wheels/*.whl
export PYTHONPATH="$PWD/site:$PWD/checkout" PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
cd checkout
python3 benchmarks/gpu.py --root ../data --out "${1:-../home}" --mode try
"""


class Pieces(io.RawIOBase):
    """A file that is written as many files of at most `PIECE` bytes."""

    def __init__(self, out: Path, size: int = PIECE) -> None:
        self._out, self._size, self._number, self._left = out, size, -1, 0
        self._file: Any = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while view:
            if not self._left:
                self.close_piece()
                self._number, self._left = self._number + 1, self._size
                self._file = (self._out / f"gpu.tar.{self._number:03}").open("wb")
            part = view[: self._left]
            self._file.write(part)
            self._left -= len(part)
            view = view[len(part) :]
        return len(data)

    def close_piece(self) -> None:
        if self._file is not None:
            self._file.close()


def wheels(python: str, folder: Path) -> Iterator[Path]:
    """The wheels for that version of Python on x86-64 Linux, without what they depend on."""
    lines = (TOP / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-"): line for line in lines}
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 34)] + [
        "--platform=manylinux2014_x86_64"
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += [f"--python-version={python}", "--implementation=cp", f"--dest={folder}"]
    packages = [*(pins.get(name, name) for name in PACKAGES), *PINNED]
    if subprocess.run([*command, *packages], check=False).returncode:
        sys.exit(f"error: a package has no wheel for Python {python}")
    yield from sorted(folder.glob("*.whl"))


@click.command()
@click.option("--python", default="3.12", show_default=True, help="Version of Python on the other machine.")
@click.option("--root", type=click.Path(path_type=Path), help="CIFAR-10's directory; without it that step is left out.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("travel"), show_default=True)
def main(python: str, root: Path | None, out: Path) -> None:
    """Write what must travel into OUT, in pieces."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("gpu.tar.*"):
        old.unlink()
    pieces = Pieces(out)
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(fileobj=pieces, mode="w|") as tar:
        script = tarfile.TarInfo("run.sh")
        script.size = len(RUN)
        tar.addfile(script, io.BytesIO(RUN.encode()))
        names = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True).stdout
        for name in names.splitlines():
            tar.add(TOP / name, f"checkout/{name}")
        if root is not None:
            tar.add(root / "cifar-10-batches-py", "data/cifar-10-batches-py")
        for wheel in wheels(python, Path(scratch)):
            tar.add(wheel, f"wheels/{wheel.name}")
    pieces.close_piece()
    sizes = [piece.stat().st_size for piece in sorted(out.glob("gpu.tar.*"))]
    click.echo(f"{len(sizes)} pieces in {out}, {sum(sizes) / 1e6:.0f} MB; there: cat gpu.tar.* | tar x && sh run.sh")


if __name__ == "__main__":
    main()
