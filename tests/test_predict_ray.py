"""A prediction job on a Ray cluster: the rows of one machine, exactly once, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from conftest import assert_input_error, mpdsgr, mpdsgr_here
from predicting import folder

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.prediction.ray_data import JOB, SUCCESS, part_file
from mpdsgr_deploy.prediction.stream import Job

pytest.importorskip("ray")
BATCH, COUNT = 2, 300  # 150 batches in five parts


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


def arguments(bundle: Bundle, array: Path, out: Path, address: str = "local") -> list[object]:
    return ["predict", bundle.path, array, "--batch", BATCH, "--ray", address, "--out", out, "--processes", 2]


def rows(out: Path) -> "list[dict[str, object]]":
    return [row for path in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_rows_are_those_of_one_machine_and_a_rerun_computes_what_is_missing(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = mpdsgr(*arguments(bundle, array, out))
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} predictions" in done.stdout
    assert rows(out) == expected
    assert parquet.read_table(out).num_rows == COUNT  # names with an underscore are no data
    assert json.loads((out / SUCCESS).read_text()) == {"rows": COUNT}
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    gone = part_file(out, 1)
    gone.unlink()
    (out / SUCCESS).unlink()
    assert mpdsgr(*arguments(bundle, array, out)).returncode == 0
    assert rows(out) == expected
    assert {path for path, changed in kept.items() if path.stat().st_mtime_ns != changed} == {gone}
    other = [*arguments(bundle, array, out), "--top", 2]
    assert_input_error(mpdsgr_here(*other), "is of another bundle, other inputs or settings")
    assert sorted(path.name for path in out.glob(".*")) == []


def test_bad_inputs_are_skipped_or_end_the_run(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    base = ["predict", bundle.path, folder / "00.png", tmp_path / "bad.png", "--ray", "local"]
    done = mpdsgr(*base, "--out", tmp_path / "stop")
    assert_input_error(done, "cannot decode image", "bad.png")
    done = mpdsgr(*base, "--on-error", "skip", "--out", tmp_path / "skip")
    assert done.returncode == 0, done.stderr
    assert [Path(str(row["input"])).name for row in rows(tmp_path / "skip")] == ["00.png"]
    assert "bad.png" in (tmp_path / "skip" / "_skipped-00000.csv").read_text()


def test_no_cluster_and_no_out_are_one_line(bundle: Bundle, array: Path, tmp_path: Path) -> None:
    assert_input_error(mpdsgr_here("predict", bundle.path, array, "--ray", "local"), "--out")
    done = mpdsgr(*arguments(bundle, array, tmp_path / "out", "127.0.0.1:1"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / JOB).exists()
