"""Run a prediction job on many machines: Ray Data gives parts of it to actors, each with a predictor.

Parts end at the boundaries of batches, so the rows equal those of a single machine, bit for bit. If a worker or the
driver dies, an unfinished part is computed again and written under the same name, so that every row exists exactly
once. All machines must reach bundle, inputs and output under the same paths, or in a store.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mpdsgr_deploy.address import BundleAddress, local_copy
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import InputError, MpdsgrError, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.prediction.faults import Faults
from mpdsgr_deploy.prediction.inputs import InputBatch, travelling
from mpdsgr_deploy.prediction.parts import (
    SKIPPED,
    SUCCESS,
    Parts,
    count_rows,
    part_name,
    parts_at,
    save_faults,
    skipped_name,
)
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.prediction.workers import Halving, Worker
from mpdsgr_deploy.prediction.writers import find_writer
from mpdsgr_deploy.progress import log, predicting
from mpdsgr_deploy.stores import Place

PART = 32  # batches per part


class Resources(NamedTuple):
    """Where a job runs: on the cluster at `address` ("local": one of this process), with at most `actors` actors.

    cpus, gpus: the devices of an actor, which may be fractions. bundle: the address from which machines fetch the job's
    bundle; without one they read its directory.
    """

    address: str
    actors: int | None = None
    cpus: float = 1
    gpus: float = 0
    bundle: BundleAddress | None = None


def predict_on_cluster(job: Job, out: Place, resources: Resources) -> int:
    """Write the rows of `job` as Parquet files to the directory `out`, and return their number.

    Raises InputError for inputs, options or an output that cannot be used, if no cluster answers, and for an error of
    an actor; StoreError for a store that cannot be reached.
    """
    if isinstance(out, Path):
        job.bundle.refuse_output(out)
    find_writer(".parquet", job.bundle.manifest.labels, job.top)
    folder = parts_at(out)
    with folder.claimed(), job.open_inputs() as inputs:
        batches = job.shard.of(inputs.batches(job.batch))
        parts = [batches[start : start + PART] for start in range(0, len(batches), PART)]
        folder.describe(_description(job, batches))
        names = folder.names()
        missing = {i: part for i, part in enumerate(parts) if part_name(i) not in names}
        if len(missing) < len(parts):
            log.info("continuing: %d of %d parts are in %s", len(parts) - len(missing), len(parts), out)
        save_faults(folder, SKIPPED, Faults(inputs.unusable if job.shard.number == 1 else {}))
        if missing:
            _run(job, folder, missing, resources)
        rows = count_rows(folder, range(len(parts)))
        folder.write(SUCCESS, json.dumps({"rows": rows}).encode())
    return rows


def _description(job: Job, batches: Sequence[InputBatch]) -> dict[str, Any]:
    """Return everything on which the rows of a job depend, as JSON values."""
    inputs = hashlib.sha256()
    for batch in batches:
        inputs.update(os.fsencode(batch.stamp()))
    return {"settings": job.settings(), "top": job.top, "skip": job.skip, "inputs_sha256": inputs.hexdigest()}


def _run(job: Job, folder: Parts, parts: dict[int, Sequence[InputBatch]], resources: Resources) -> None:
    ray, data = need("ray", "ray"), need("ray.data", "ray")
    for name in ("ray", "ray.data"):  # hide Ray's messages about its plans and pools
        logging.getLogger(name).setLevel(logging.ERROR)
    items = [{"part": i, "batches": ray.cloudpickle.dumps(travelling(part))} for i, part in parts.items()]
    with _connected(ray, resources.address):
        data.DataContext.get_current().enable_progress_bars = False
        most = min(resources.actors or len(items), len(items))  # more than fit now, because machines may join
        fitting = _fitting(ray.cluster_resources(), resources)
        answered = data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(replace(job, paths=()), folder, resources.bundle),  # the paths are in the batches
            batch_size=1,
            compute=data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(fitting, most)),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
        )
        total = sum(len(batch) for part in parts.values() for batch in part)
        with predicting(total) as advance:
            for row in answered.iter_rows():
                if row["error"]:
                    raise InputError(str(row["error"]))
                advance(int(row["images"]))


def _fitting(available: Mapping[str, float], resources: Resources) -> int:
    """Return how many actors fit into a cluster's devices now, but at least 1, because machines may join later.

    Raises InputError if none fits and the cluster is this machine alone.
    """
    per_actor = {"CPU": resources.cpus, "GPU": resources.gpus}
    fitting = min((int(available.get(name, 0) / share) for name, share in per_actor.items() if share), default=1)
    if not fitting:
        devices = ", ".join(f"{available.get(name, 0):g} {name}s" for name in per_actor)
        needed = f"an actor takes {resources.cpus:g} CPUs and {resources.gpus:g} GPUs"
        if resources.address == "local":
            raise InputError(f"{needed}, and this machine has {devices}; lower --ray-cpus or --ray-gpus")
        log.warning("%s, and the cluster has %s; waiting for more machines to join it", needed, devices)
    return max(1, fitting)


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to Ray for a with block; an existing connection is used and kept."""
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
        raise InputError(
            f"no Ray cluster answers at {address} ({one_line(error)}); start one, or use --ray local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Actor:
    """Opens a predictor on one machine of the cluster, and writes one part after another.

    Errors of this package are returned in the rows, because Ray reduces raised errors to a text with its own advice.
    """

    def __init__(self, job: Job, folder: Parts, address: BundleAddress | None = None) -> None:
        self._job, self._folder, self._address = job, folder, address
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
        if self._answer is None:
            if self._address is not None:
                self._job = replace(self._job, bundle=open_bundle(local_copy(self._address)))
            job = self._job
            worker = Worker(job.bundle, job.backend, job.precision, job.batch)
            self._answer = self._stack.enter_context(worker.open())
        job, answer = self._job, self._answer
        faults = Faults({})
        write = find_writer(".parquet", job.bundle.manifest.labels, job.top)
        with self._folder.part(number) as file, ExitStack() as sources:
            for batch in batches:
                sources.callback(batch.source.close)
            answers = job.answers_through(lambda images: self._pool.submit(answer, images), batches)
            write(file, lambda: faults.without(answers))
            save_faults(self._folder, skipped_name(number), faults)
        return sum(map(len, batches))
