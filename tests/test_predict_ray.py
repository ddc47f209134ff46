"""A prediction job on a Ray cluster: the rows of one machine, exactly once, whatever dies."""

import io
import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from conftest import assert_input_error, mpdsgr_here
from object_store import BUCKET, ObjectStore
from PIL import Image
from predicting import folder
from ray_cluster import until
from ray_nodes import Nodes, actors, nodes, store

from mpdsgr_deploy.address import parse_address
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli import predict as cli
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction.inputs import Inputs
from mpdsgr_deploy.prediction.parts import JOB, SUCCESS, part_name, parts_at
from mpdsgr_deploy.prediction.ray_data import _Actor
from mpdsgr_deploy.prediction.sources import ImageSource, Pixels
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.stores import place_of

BATCH, COUNT = 2, 320  # 160 batches in 5 parts


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


def arguments(bundle: Bundle, array: object, out: object) -> list[object]:
    return ["predict", bundle.path, array, "--batch", BATCH, "--ray", "local", "--out", out, "--processes", 2]


def rows(out: Path) -> "list[dict[str, object]]":
    return [row for path in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def some_parts(out: Path) -> set[Path]:
    """The parts that are there, once there is one."""
    return until(lambda: set(out.glob("part-*.parquet")), "a part")


class Held:
    """A source whose images from row `after` on are not read before `flag` exists."""

    def __init__(self, source: ImageSource, flag: Path, after: int) -> None:
        self.source, self.flag, self.after, self.shape = source, flag, after, source.shape

    def read(self, start: int, stop: int, pool: Executor) -> Pixels:
        for _ in range(6000):
            if start < self.after or self.flag.exists():
                break
            time.sleep(0.02)
        return self.source.read(start, stop, pool)

    def part(self, start: int, stop: int) -> tuple[ImageSource, int]:
        part, index = self.source.part(start, stop)
        return Held(part, self.flag, self.after + index - start), index

    def __len__(self) -> int:
        return len(self.source)

    def names(self, start: int, stop: int) -> list[str]:
        return self.source.names(start, stop)

    def stamp(self, start: int, stop: int) -> str:
        return self.source.stamp(start, stop)

    def close(self) -> None: ...


class HeldJob(Job):
    after = 0

    def open_inputs(self) -> Inputs:
        inputs = super().open_inputs()
        inputs._sources = [Held(source, Path(f"{self.paths[0]}.flag"), self.after) for source in inputs._sources]
        return inputs


class HalfHeldJob(HeldJob):
    after = COUNT // 2


@pytest.fixture
def flag(array: Path) -> Iterator[Path]:
    """The file for which the images of a job wait, in actors that have this module's classes."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    flag = Path(f"{array}.flag")
    yield flag
    flag.unlink(missing_ok=True)


def test_a_job_survives_a_killed_node_and_a_rerun_computes_what_is_missing(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], nodes: Nodes, tmp_path: Path, flag: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its rows are those of one machine."""
    out = tmp_path / "out"
    monkeypatch.setattr(cli, "Job", HalfHeldJob)

    def kill() -> None:
        try:
            some_parts(out)
            nodes.kill_one()
        finally:
            flag.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    done = mpdsgr_here(*arguments(bundle, array, out))
    killer.join()
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} predictions" in done.stdout
    assert rows(out) == expected
    assert parquet.read_table(out).num_rows == COUNT  # names with an underscore are no data
    assert json.loads((out / SUCCESS).read_text()) == {"rows": COUNT}
    times = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    gone = out / part_name(1)
    gone.unlink()
    assert mpdsgr_here(*arguments(bundle, array, out), "--processes", 1).returncode == 0
    assert rows(out) == expected
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [gone]
    other = [*arguments(bundle, array, out), "--top", 2]
    assert_input_error(
        mpdsgr_here(*other), "holds predictions of another bundle, of other inputs or with other settings"
    )
    assert [path.name for path in out.glob(".*.tmp")] == []


def test_actors_start_on_a_machine_that_joins(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], nodes: Nodes, tmp_path: Path, flag: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before the test that kills a driver: Ray keeps resources for one that it believes alive, for minutes."""
    import ray

    nodes.kill_one()
    until(lambda: ray.cluster_resources()["CPU"] == 1, "the end of the second node", every=0.1)
    monkeypatch.setattr(cli, "Job", HeldJob)
    command = arguments(bundle, array, tmp_path / "out")[:-2]  # without --processes, which limits the actors
    with ThreadPoolExecutor(1) as pool:  # Ray starts nodes from the main thread alone
        running = pool.submit(mpdsgr_here, *command)
        try:
            until(actors, "an actor", every=0.2)
            nodes.add_one()
            until(lambda: len(actors()) > 1, "an actor on the second node", every=0.2)
        finally:
            flag.touch()
        done = running.result()
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out") == expected


def shard(array: Path) -> bytes:
    """A Parquet file with the images of an array file."""
    files = []
    for image in np.load(array):
        Image.fromarray(image[0]).save(file := io.BytesIO(), "bmp")
        files.append(file.getvalue())
    table = arrow.table({"image": [{"bytes": content, "path": None} for content in files]})
    parquet.write_table(table, file := io.BytesIO(), row_group_size=100)
    return file.getvalue()


def written_parts(store: ObjectStore) -> set[str]:
    """The parts that the store was asked to write, though it may not have done so yet."""
    paths = [request.path.lstrip("/") for request in [*store.requests] if request.method == "PUT"]
    return {path for path in paths if "part-" in path}


def test_from_a_store_into_a_store_though_driver_and_worker_are_killed(
    bundle: Bundle, array: Path, expected: list[dict[str, object]], nodes: Nodes, store: ObjectStore
) -> None:
    store.put({"shards/0.parquet": shard(array)})
    command = [*arguments(bundle, f"s3://{BUCKET}/shards", f"s3://{BUCKET}/out"), "--processes", 1]

    def parts() -> set[str]:
        return {path for path in store.fs.find(f"{BUCKET}/out") if "part-" in path}

    store.hold("/out/part-", after=2)
    driver = subprocess.Popen([sys.executable, "-m", "mpdsgr_deploy", *map(str, command), "--ray", nodes.address])
    until(lambda: len(parts()) == 2, "two parts", every=0.2)
    driver.kill()
    driver.wait()
    kept, of_killed_driver, killed = parts(), set(actors()), []
    store.requests.clear()

    def kill() -> None:
        try:
            until(lambda: written_parts(store) - kept, "another part")
            of_this_job = until(lambda: set(actors()) - of_killed_driver, "an actor of this job")
            killed.append(of_this_job.pop())
            os.kill(killed[0], signal.SIGKILL)
        finally:
            store.release()

    killer = threading.Thread(target=kill)
    killer.start()
    done = mpdsgr_here(*command)
    killer.join()
    assert killed
    assert done.returncode == 0, done.stderr
    assert not kept & written_parts(store)
    written = [row for path in sorted(parts()) for row in parquet.read_table(path, filesystem=store.fs).to_pylist()]
    names = [f"s3://{BUCKET}/shards/0.parquet[{i}]" for i in range(COUNT)]
    assert written == [{**row, "input": name} for name, row in zip(names, expected, strict=True)]
    assert json.loads(store.fs.cat_file(f"{BUCKET}/out/{SUCCESS}")) == {"rows": COUNT}
    assert_input_error(mpdsgr_here(*command, "--top", 2), "holds predictions of another bundle, of other inputs")
    assert_input_error(mpdsgr_here(*command, "--out", f"s3://{BUCKET}/shards"), "is not a set of predictions of mpdsgr")
    assert_input_error(mpdsgr_here(*command, "--out", "s3://no-bucket/out"), "s3://no-bucket/out does not exist")


def test_of_two_jobs_that_start_at_once_one_gets_the_folder(store: ObjectStore) -> None:
    first, second = (parts_at(place_of(f"s3://{BUCKET}/race")) for _ in range(2))
    with first.claimed(), second.claimed():
        first.describe({"top": 1})
        with pytest.raises(InputError, match="holds predictions of another bundle"):
            second.describe({"top": 2})
        second.describe({"top": 1})  # the same job twice writes the same files


def test_a_machine_without_the_devices_is_refused(bundle: Bundle, array: Path, tmp_path: Path) -> None:
    command = arguments(bundle, array, tmp_path / "out")
    assert_input_error(mpdsgr_here(*command, "--ray-gpus", 1), "an actor takes 1 CPUs and 1 GPUs, and this machine has")


def test_a_machine_fetches_a_bundle_that_it_does_not_have(
    bundle: Bundle, array: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPDSGR_CACHE", str(tmp_path / "cache"))
    store.put({f"models/small/{file.name}": file.read_bytes() for file in bundle.path.iterdir() if file.is_file()})
    elsewhere = Bundle(tmp_path / "elsewhere", bundle.manifest)
    job = Job(elsewhere, [array], "onnxruntime-cpu", "fp32", BATCH)
    out = tmp_path / "out"
    out.mkdir()
    with job.open_inputs() as inputs:
        part = {"part": np.array([0]), "batches": [pickle.dumps(inputs.batches(BATCH)[:1])]}
    assert "not" in _Actor(job, parts_at(out))(part)["error"][0]
    address = parse_address(f"s3://{BUCKET}/models/small@sha256:{bundle.manifest.digest}")
    assert _Actor(job, parts_at(out), address)(part) == {"images": [BATCH], "error": [""]}
    assert len(rows(out)) == BATCH


def test_bad_inputs_are_skipped_or_end_the_run(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    base = ["predict", bundle.path, folder / "00.png", tmp_path / "bad.png", "--ray", "local", "--processes", 1]
    assert_input_error(mpdsgr_here(*base), "name it with --out")
    done = mpdsgr_here(*base, "--out", tmp_path / "stop")
    assert_input_error(done, "cannot decode image", "bad.png")
    assert (tmp_path / "stop" / JOB).exists()
    assert not (tmp_path / "stop" / SUCCESS).exists()
    done = mpdsgr_here(*base, "--on-error", "skip", "--out", tmp_path / "skip")
    assert done.returncode == 0, done.stderr
    assert [Path(str(row["input"])).name for row in rows(tmp_path / "skip")] == ["00.png"]
    assert "bad.png" in (tmp_path / "skip" / "_skipped-00000.csv").read_text()
