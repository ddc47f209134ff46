"""Pack a table's results and networks into tar files, to copy them to another machine."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.checkpoint import FILE, load_checkpoint, save_checkpoint
from mpdsgr_deploy.progress import log

PIECE = 15 * 2**20  # largest size of a file weights.tar.NN, in bytes
SMALL = 40 * 2**20  # size of the largest float16 checkpoint that is packed, in bytes


def pack(name: str, *, runs: Path, results: Path, out: Path) -> None:
    """Pack the records and the page of table `name` into out/results.tar, and its networks into out/weights.tar.NN.

    runs, results: the directories of all tables' training runs and results. For the networks, see `pack_weights`.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.tar", tar({f"{name}/{path.name}": path for path in sorted((results / name).glob("*"))}))
    pack_weights(runs / name, out)


def tar(files: dict[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, path in files.items():
            archive.add(path, name)
    return buffer.getvalue()


def pack_weights(runs: Path, out: Path) -> None:
    """Pack the last checkpoints of all finished runs, in float16, into one tar archive that is cut into pieces.

    Checkpoints larger than SMALL are left out and logged.
    """
    files: dict[str, Path] = {}
    with TemporaryDirectory() as scratch:
        for run in finished(runs):
            checkpoint = halved(run / "last", Path(scratch) / run.name)
            size = sum(path.stat().st_size for path in checkpoint.iterdir())
            if size > SMALL:
                log.info("%s is not packed, because it takes %.0f MiB in float16", run.name, size / 2**20)
                continue
            files |= {f"{run.name}/{path.name}": path for path in checkpoint.iterdir()}
        packed = tar(files)
    for old in out.glob("weights.tar.*"):
        old.unlink()
    for number, start in enumerate(range(0, len(packed) if files else 0, PIECE)):
        write_atomic(out / f"weights.tar.{number:02}", packed[start : start + PIECE])


def finished(runs: Path) -> Iterator[Path]:
    """Yield the directories of the runs that have trained all epochs of their recipe."""
    for run in sorted(runs.glob("*")):
        if (run / "last" / FILE).exists():
            checkpoint = load_checkpoint(run / "last")
            if checkpoint.epoch == checkpoint.recipe.training.epochs:
                yield run


def halved(source: Path, target: Path) -> Path:
    """Write a copy of a checkpoint with float16 weights, which `mpdsgr export` accepts, and return its directory."""
    checkpoint = load_checkpoint(source)
    weights = load_file(source / checkpoint.weights)
    small = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_checkpoint(target, checkpoint, small)
    return target
