"""Reproduce a table on a machine that is lent for minutes: stop in time, continue next time, bring home what matters.

    python train/gpu/run.py cifar10-gpu --root data --minutes 9 --out "$OUT"   all rows, as far as the time reaches
    python train/gpu/run.py cifar10-gpu reg at --root data --out "$OUT"        two of them

It runs train/reproduce.py and ends it when the time is up; the same command continues after the last finished epoch and
the last finished batch of an attack. Into --out go `results.tar`, the table's results and page, and the weights of all
finished rows that are small enough, as float16 checkpoints in pieces: `cat weights.tar.* | tar x`.
"""

import io
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from table import load_table

from mpdsgr_deploy.cli import OneLineErrors
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.progress import log, show_progress

TRAIN = Path(__file__).parent.parent
REPRODUCE, RESULTS = TRAIN / "reproduce.py", TRAIN / "results"
PIECE = 15 * 2**20  # bytes of a file that is brought home
SMALL = 40 * 2**20  # bytes of a float16 checkpoint that is
GRACE = 20.0  # seconds between the request to stop and the end


@click.command(cls=OneLineErrors)
@click.argument("table")
@click.argument("rows", nargs=-1)
@click.option("--root", default="data", show_default=True, help="Where the data set lies.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Training runs.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Results so far.")
@click.option("--seeds", metavar="0,1,..", help="Train with these seeds.  [default: the table's]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for what is brought home.")
@click.pass_context
def main(
    ctx: click.Context,
    table: str,
    rows: tuple[str, ...],
    root: str,
    runs: Path,
    results: Path,
    seeds: str | None,
    minutes: float,
    out: Path,
) -> None:
    """Reproduce the ROWS (all without any) of TABLE for so many MINUTES, and pack what there is."""
    show_progress()
    name, _ = load_table(table)
    own = ["--root", root, "--runs", str(runs), "--out", str(results), *(["--seeds", seeds] if seeds else [])]
    code = until([sys.executable, str(REPRODUCE), table, *rows, *own], time.monotonic() + 60 * minutes)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.tar", tar({str(p.relative_to(results)): p for p in sorted((results / name).glob("*"))}))
    pack_weights(runs / name, out)
    ctx.exit(0 if code is None else code)


def until(command: list[str], deadline: float) -> int | None:
    """Run a command; its exit status, or None if it was ended because the time was up."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.info("the time is up; the same command continues")
            child.terminate()  # not SIGINT, which a command in the background of a shell ignores
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
    return None


def tar(files: dict[str, Path]) -> bytes:
    """An archive of files under the names given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, path in files.items():
            archive.add(path, name)
    return buffer.getvalue()


def pack_weights(runs: Path, out: Path) -> None:
    """The last checkpoints of all runs that finished and are small enough, in pieces; the others are named."""
    files: dict[str, Path] = {}
    with TemporaryDirectory() as scratch:
        for run in finished(runs):
            checkpoint = halved(run / "last", Path(scratch) / run.name)
            size = sum(path.stat().st_size for path in checkpoint.iterdir())
            if size > SMALL:
                log.info("%s stays here: %.0f MiB in float16", run.name, size / 2**20)
                continue
            files |= {f"{run.name}/{path.name}": path for path in checkpoint.iterdir()}
        packed = tar(files)
    for old in out.glob("weights.tar.*"):
        old.unlink()
    for number, start in enumerate(range(0, len(packed) if files else 0, PIECE)):
        write_atomic(out / f"weights.tar.{number:02}", packed[start : start + PIECE])


def finished(runs: Path) -> Iterator[Path]:
    """Runs whose last epoch is done."""
    from mpdsgr_deploy.checkpoint import FILE, load_checkpoint

    for run in sorted(runs.glob("*")):
        if (run / "last" / FILE).exists():
            checkpoint = load_checkpoint(run / "last")
            if checkpoint.epoch == checkpoint.recipe.training.epochs:
                yield run


def halved(source: Path, target: Path) -> Path:
    """A checkpoint with float16 weights, which `mpdsgr export` takes like any other."""
    from safetensors.torch import load_file

    from mpdsgr_deploy.checkpoint import load_checkpoint, save_checkpoint

    checkpoint = load_checkpoint(source)
    weights = load_file(source / checkpoint.weights)
    small = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_checkpoint(target, checkpoint, small)
    return target


if __name__ == "__main__":
    main()
