"""A prediction job on Ray Data beside the local command: images per second on one machine, and memory as the job grows.

    python benchmarks/ray_data.py      writes benchmarks/results/ray_data.json and the table of README.md

Small PNG files in folders, with --parquet as rows of Parquet files, classified by the shipped network for digits. Both
are whole commands, the start of processes included. Memory is the largest resident set of one process of the command,
Ray's own services left out.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import harness
import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image

from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.reference import IMAGES, load_images

BUNDLE = harness.FOLDER.parent / "export" / "bundles" / "digits"
FOLDER, SHARD = 1000, 10_000  # images
FILES = "PNG files"
MARK = "MPDSGR_BENCHMARK"  # in the environment of all processes of a command
MEMORY = Path("/dev/shm")  # where files cost no disk
EQUAL = {"RAY_worker_niceness": "0"}  # by default Ray's workers leave the processor to all other work of the machine


@click.option("--images", "counts", multiple=True, default=(20_000, 200_000), show_default=True, type=click.IntRange(1))
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1))
@click.option("--turns", default=1, show_default=True, type=click.IntRange(1), help="Of each.")
@click.option("--parquet", "in_parquet", is_flag=True, help="Images as rows of Parquet files.")
def run(counts: tuple[int, ...], batch: int, turns: int, in_parquet: bool) -> dict[str, Any]:
    """Time the local command and Ray on the same images."""
    result: dict[str, Any] = {"batch": batch, "inputs": "Parquet rows" if in_parquet else FILES, "counts": {}}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
            (write_shards if in_parquet else write_images)(Path(place) / "images", count)
            options = {"local": ["--out", f"{place}/local.parquet"], "ray": ["--ray", "local", "--out", f"{place}/ray"]}
            command = ["predict", str(BUNDLE), f"{place}/images", "--batch", str(batch)]
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in options}
            for _ in range(turns):
                for name, own in options.items():
                    subprocess.run(["rm", "-rf", own[-1]], check=True)
                    taken[name].append(measured([*command, *own]))
            local, ray = (parquet.read_table(own[-1]) for own in options.values())
            assert ray.sort_by("input").equals(local.sort_by("input")), "the rows of both must be the same"
            result["counts"][str(count)] = {"taken": taken, "rows": ray.num_rows}
    return {**result, "versions": {name: package_version(name) for name in ("ray", "onnxruntime", "pyarrow")}}


def encoded() -> list[bytes]:
    """The test images of the digits as PNG files."""
    files = []
    for image in load_images(BUNDLE / IMAGES).pixels:
        Image.fromarray(image[0]).save(file := BytesIO(), "png")
        files.append(file.getvalue())
    return files


def write_images(folder: Path, count: int) -> None:
    """Digits as PNG files, a thousand to a folder."""
    for number, content in enumerate(islice(cycle(encoded()), count)):
        if number % FOLDER == 0:
            (folder / f"{number // FOLDER:04}").mkdir(parents=True)
        (folder / f"{number // FOLDER:04}" / f"{number % FOLDER:04}.png").write_bytes(content)


def write_shards(folder: Path, count: int) -> None:
    """Digits as PNG files in the rows of Parquet files, ten thousand to a file, a thousand to a row group."""
    folder.mkdir(parents=True)
    contents = islice(cycle(encoded()), count)
    for number in range(-(-count // SHARD)):
        table = arrow.table({"image": list(islice(contents, SHARD))})
        parquet.write_table(table, folder / f"{number:04}.parquet", row_group_size=FOLDER)


def measured(arguments: list[str]) -> dict[str, float]:
    """Seconds of the whole command, and MiB of its largest process."""
    mark, peak = secrets.token_hex(8), [0.0]
    started = time.perf_counter()
    command = [sys.executable, "-m", "mpdsgr_deploy", *arguments]
    with subprocess.Popen(command, env={**os.environ, **EQUAL, MARK: mark}, stdout=subprocess.DEVNULL) as process:
        watcher = threading.Thread(target=watch, args=(process, mark, peak))
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        watcher.join()
    if code:
        sys.exit(f"error: {' '.join(arguments)} ended with {code}")
    return {"seconds": seconds, "peak_mib": peak[0]}


def watch(process: "subprocess.Popen[bytes]", mark: str, peak: list[float]) -> None:
    """Keep the largest resident set, in MiB, of the command and of Ray's actors that it has."""
    while process.poll() is None:
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, StopIteration):
                if f"{MARK}={mark}".encode() not in (place / "environ").read_bytes():
                    continue
                if int(place.name) != process.pid and b"_Actor" not in (place / "cmdline").read_bytes():
                    continue
                lines = (place / "status").read_text().splitlines()
                resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
                peak[0] = max(peak[0], resident / 1024)
        time.sleep(0.5)


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = []
    for count, measured_at in result["counts"].items():
        taken = measured_at["taken"]
        for name, runs in taken.items():
            seconds = [one["seconds"] for one in runs]
            peak = max(one["peak_mib"] for one in runs)
            ratios = harness.spread([one["seconds"] for one in taken["local"]], seconds)
            rows.append([count, name, f"{min(seconds):.1f}", f"{int(count) / min(seconds):.0f}", ratios, f"{peak:.0f}"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    turns = len(next(iter(result["counts"].values()))["taken"]["local"])
    return harness.table(
        ["images", "command", "s", "images/s", "times local", "MiB"],
        rows,
        f"{result.get('inputs', FILES)} of 8x8 pixels in memory (/dev/shm), batch {result['batch']}, best of n = "
        f"{turns}; `times local`: images per second, paired. Ray's workers run at the command's own priority, not at "
        f"their default, which leaves the processor to other work. {versions}.",
        harness.source(result),
    )


main = harness.command("ray_data", run, render)

if __name__ == "__main__":
    main()
