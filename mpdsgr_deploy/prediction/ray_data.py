"""A prediction job on many machines: Ray Data hands parts of it to actors, each of which holds a predictor.

    OUT/_job.json             what is computed: a rerun of the same job goes on, another one is refused
    OUT/part-00000.parquet    the rows of some batches, each file written once and whole
    OUT/_skipped-00000.csv    inputs that part 0 left out, and why
    OUT/_SUCCESS              the number of rows, written when every part is there

Parts are cut between batches, so the rows are those of a single machine, bit for bit. A part that was begun by a worker
or a driver that died is computed again and written under its own name: every row is there exactly once. Readers of
Parquet folders leave names with an underscore alone. All machines need the bundle, the inputs and OUT under the same
paths.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mpdsgr_deploy.errors import InputError, MpdsgrError, one_line
from mpdsgr_deploy.files import claim_directory, complete_file, write_atomic
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.prediction.faults import Faults
from mpdsgr_deploy.prediction.inputs import InputBatch
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.prediction.workers import Halving, Worker
from mpdsgr_deploy.prediction.writers import find_writer
from mpdsgr_deploy.progress import log, meter

JOB, SUCCESS = "_job.json", "_SUCCESS"
PART = 32  # batches per file


class Resources(NamedTuple):
    """Where a job runs: on the cluster at `address` ("local": on one of this process), actors up to `actors`.

    cpus, gpus: what an actor takes of its machine, in whole or fractional devices.
    """

    address: str
    actors: int | None = None
    cpus: float = 1
    gpus: float = 0


def predict_on_cluster(job: Job, out: Path, resources: Resources) -> int:
    """Write the rows of `job` as Parquet files into directory `out`; returns their number.

    Raises InputError for inputs, options or an output that cannot be used, and where no cluster answers.
    """
    job.bundle.refuse_output(out)
    find_writer(".parquet", job.bundle.manifest.labels, job.top)
    claim_directory(out, JOB, "set of predictions")
    with exclusive(out / LOCK, "mpdsgr predict"), job.open_inputs() as inputs:
        batches = job.shard.of(inputs.batches(job.batch))
        parts = [batches[start : start + PART] for start in range(0, len(batches), PART)]
        _claim_job(job, out, batches)
        missing = {i: part for i, part in enumerate(parts) if not part_file(out, i).exists()}
        if len(missing) < len(parts):
            log.info("going on: %d of %d parts are in %s", len(parts) - len(missing), len(parts), out)
        Faults(inputs.unusable if job.shard.number == 1 else {}).save(out / "_skipped.csv")
        if missing:
            _run(job, out, missing, resources)
        rows = sum(_rows(part_file(out, i)) for i in range(len(parts)))
        write_atomic(out / SUCCESS, json.dumps({"rows": rows}).encode())
    return rows


def part_file(out: Path, number: int) -> Path:
    return out / f"part-{number:05}.parquet"


def _claim_job(job: Job, out: Path, batches: Sequence[InputBatch]) -> None:
    """Write _job.json, or raise InputError if `out` holds parts of another job."""
    inputs = hashlib.sha256()
    for batch in batches:
        inputs.update(os.fsencode(batch.stamp()))
    described = {"settings": job.settings(), "top": job.top, "skip": job.skip, "inputs_sha256": inputs.hexdigest()}
    with suppress(OSError, ValueError):
        if json.loads((out / JOB).read_bytes()) != described:
            raise InputError(
                f"{out} holds predictions of another bundle, other inputs or settings; choose another --out"
            )
    write_atomic(out / JOB, json.dumps(described).encode())


def _run(job: Job, out: Path, parts: dict[int, Sequence[InputBatch]], resources: Resources) -> None:
    ray, data = need("ray", "ray"), need("ray.data", "ray")
    for name in ("ray", "ray.data"):  # hide Ray's messages about its plans and pools
        logging.getLogger(name).setLevel(logging.ERROR)
    items = [{"part": i, "batches": ray.cloudpickle.dumps([b.alone() for b in part])} for i, part in parts.items()]
    with _connected(ray, resources.address):
        data.DataContext.get_current().enable_progress_bars = False
        most = resources.actors or max(1, int(ray.cluster_resources().get("CPU", 1) / max(resources.cpus, 0.01)))
        actors = min(most, len(items))
        answered = data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(job, str(out)),
            batch_size=1,
            compute=data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
        )
        total = sum(len(batch) for part in parts.values() for batch in part)
        with meter("predicting", "images", total=total) as advance:
            for row in answered.iter_rows():
                if row["error"]:
                    raise InputError(str(row["error"]))
                advance(int(row["images"]))


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection to Ray that ends with the block, unless the process was connected before."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            None if address == "local" else address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


class _Actor:
    """Holds a predictor on one machine of the cluster and writes one part after another.

    Our errors are returned, not raised: of those Ray keeps only a text with its own advice.
    """

    def __init__(self, job: Job, out: str) -> None:
        self._job, self._out = job, Path(out)
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(1))
        self._answer: Halving | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        from ray import cloudpickle

        parts = zip(rows["part"].tolist(), map(cloudpickle.loads, rows["batches"]), strict=True)
        try:
            return {"images": [self._write(number, batches) for number, batches in parts], "error": [""]}
        except MpdsgrError as error:
            return {"images": [0], "error": [one_line(error)]}

    def _write(self, number: int, batches: Sequence[InputBatch]) -> int:
        job = self._job
        if self._answer is None:
            worker = Worker(job.bundle, job.backend, job.precision, job.batch)
            self._answer = self._stack.enter_context(worker.open())
        answer = self._answer
        faults = Faults({})
        write = find_writer(".parquet", job.bundle.manifest.labels, job.top)
        with _whole(part_file(self._out, number)) as file:
            answers = job.answers_through(lambda images: self._pool.submit(answer, images), batches)
            write(file, lambda: faults.without(answers))
            faults.save(self._out / f"_skipped-{number:05}.csv")
        return sum(map(len, batches))


def _whole(path: Path) -> AbstractContextManager[BinaryIO]:
    """A file that gets its name once it is complete, even if two processes write it at the same time."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    return complete_file(path, temporary, "the parts that are finished are kept")


def _rows(path: Path) -> int:
    return int(need("pyarrow.parquet", "parquet").read_metadata(path).num_rows)
