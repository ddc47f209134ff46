"""A prediction job on a Ray cluster: the rows of one machine, exactly once, whatever dies."""

import json
import subprocess
import sys
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

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.prediction.ray_data import JOB, SUCCESS, part_file
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.recipes import shipped

BATCH, COUNT = 2, 1200  # 600 batches in 19 parts


class Nodes:
    """Two nodes with a CPU each on this machine, to which this process is connected."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self._cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        self._second = self._cluster.add_node(**small)
        self.address = str(self._cluster.address)

    def kill_one(self) -> None:
        """Kill all processes of the second node at once."""
        self._cluster.remove_node(self._second, allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()


def started() -> Nodes:
    """On a busy machine Ray gives up a node before it has started, and is to be asked again."""
    for _ in range(2):
        with suppress(Exception):
            return Nodes()
    return Nodes()


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[Nodes]:
    """One small cluster for all tests, which the command finds connected."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:
        # else actors would wait for all other work of a busy machine
        for key, value in {**NO_TOKEN, "RAY_worker_niceness": "0"}.items():
            environment.setenv(key, value)
        cluster = started()
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.stop()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A small one that comes with the package."""
    return open_bundle(shipped("export") / "doctor" / "bundle")


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


def some_parts(out: Path) -> set[Path]:
    """The parts that are there, once there is one."""
    end = time.monotonic() + 120
    while not (parts := set(out.glob("part-*.parquet"))):
        assert time.monotonic() < end, "no part was written"
        time.sleep(0.005)
    return parts


def test_rows_are_those_of_one_machine_though_a_node_is_killed(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], nodes: Nodes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed: list[bool] = []

    def kill() -> None:
        some_parts(out)
        nodes.kill_one()
        killed.append(not (out / SUCCESS).exists())

    killer = threading.Thread(target=kill)
    killer.start()
    done = mpdsgr_here(*arguments(bundle, array, out))
    killer.join()
    assert killed == [True], "the job was to be at work when the node was killed"
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} predictions" in done.stdout
    assert rows(out) == expected
    assert parquet.read_table(out).num_rows == COUNT  # names with an underscore are no data
    assert json.loads((out / SUCCESS).read_text()) == {"rows": COUNT}


def test_a_rerun_after_a_killed_driver_computes_what_is_missing(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], nodes: Nodes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*arguments(bundle, array, out), "--ray", nodes.address]
    driver = subprocess.Popen([sys.executable, "-m", "mpdsgr_deploy", *map(str, command)], stderr=subprocess.PIPE)
    kept = {path: path.stat().st_mtime_ns for path in some_parts(out)}
    driver.kill()
    driver.communicate()
    assert not (out / SUCCESS).exists(), "the driver was to be killed before the end"
    assert mpdsgr_here(*arguments(bundle, array, out)).returncode == 0
    assert rows(out) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    gone = part_file(out, 1)
    gone.unlink()
    assert mpdsgr_here(*arguments(bundle, array, out)).returncode == 0
    assert rows(out) == expected
    other = [*arguments(bundle, array, out), "--top", 2]
    assert_input_error(mpdsgr_here(*other), "holds predictions of another bundle, other inputs or settings")
    assert [path.name for path in out.glob(".*.tmp")] == []


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
