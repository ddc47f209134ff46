"""A prediction job on a Ray cluster: the rows of one machine, exactly once, whatever dies."""

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from conftest import assert_input_error, mpdsgr_here
from predicting import folder
from ray_cluster import NO_TOKEN

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.prediction.ray_data import JOB, SUCCESS, part_file
from mpdsgr_deploy.prediction.stream import Job

BATCH, COUNT = 2, 300  # 150 batches in five parts
MARK = "MPDSGR_TEST_RAY"  # tells the processes of this cluster from those of others


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """One small cluster for all tests, which the command finds connected; yields the mark of its processes."""
    ray = pytest.importorskip("ray")
    mark = secrets.token_hex(8)
    with pytest.MonkeyPatch.context() as environment:
        for key, value in {MARK: mark, **NO_TOKEN}.items():
            environment.setenv(key, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
        yield mark
        ray.shutdown()


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("array") / "a.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (COUNT, 1, 8, 8), np.uint8))
    return path


@pytest.fixture(scope="module")
def expected(bundle: Bundle, array: Path) -> "list[dict[str, object]]":
    out = array.with_name("local.parquet")
    Job(bundle, [array], "onnxruntime-cpu", "fp32", BATCH).to_file(out)
    return parquet.read_table(out).to_pylist()


def arguments(bundle: Bundle, array: Path, out: Path) -> list[object]:
    return ["predict", bundle.path, array, "--batch", BATCH, "--ray", "local", "--out", out, "--processes", 2]


def rows(out: Path) -> "list[dict[str, object]]":
    return [row for path in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def kill_an_actor(mark: str, out: Path) -> None:
    """Kill one process that writes parts, as soon as the first part is there."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if list(out.glob("part-*.parquet")):
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    ours = f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0")
                    if ours and b"_Actor" in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
                        return
        time.sleep(0.005)


def test_rows_are_those_of_one_machine_though_a_worker_is_killed(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], cluster: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killer = threading.Thread(target=kill_an_actor, args=(cluster, out))
    killer.start()
    done = mpdsgr_here(*arguments(bundle, array, out))
    killer.join()
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} predictions" in done.stdout
    assert rows(out) == expected
    assert parquet.read_table(out).num_rows == COUNT  # names with an underscore are no data
    assert json.loads((out / SUCCESS).read_text()) == {"rows": COUNT}


def test_a_rerun_computes_what_is_missing_and_refuses_another_job(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mpdsgr_here(*arguments(bundle, array, out)).returncode == 0
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    gone = part_file(out, 1)
    gone.unlink()  # as if the driver had been killed before it was written
    (out / SUCCESS).unlink()
    assert mpdsgr_here(*arguments(bundle, array, out)).returncode == 0
    assert rows(out) == expected
    assert {path for path, changed in kept.items() if path.stat().st_mtime_ns != changed} == {gone}
    other = [*arguments(bundle, array, out), "--top", 2]
    assert_input_error(mpdsgr_here(*other), "holds predictions of another bundle, other inputs or settings")
    assert sorted(path.name for path in out.glob(".*")) == []


def test_bad_inputs_are_skipped_or_end_the_run(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    base = ["predict", bundle.path, folder / "00.png", tmp_path / "bad.png", "--ray", "local"]
    assert_input_error(mpdsgr_here(*base), "name it with --out")
    done = mpdsgr_here(*base, "--out", tmp_path / "stop")
    assert_input_error(done, "cannot decode image", "bad.png")
    assert (tmp_path / "stop" / JOB).exists()
    assert not (tmp_path / "stop" / SUCCESS).exists()
    done = mpdsgr_here(*base, "--on-error", "skip", "--out", tmp_path / "skip")
    assert done.returncode == 0, done.stderr
    assert [Path(str(row["input"])).name for row in rows(tmp_path / "skip")] == ["00.png"]
    assert "bad.png" in (tmp_path / "skip" / "_skipped-00000.csv").read_text()
