"""What tests of jobs on Ray share: a cluster inside this process that grows and shrinks, and knows an object store."""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore, object_store
from ray_cluster import MARK, NO_TOKEN


class Nodes:
    """Two nodes with a CPU each on this machine, to which this process is connected."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_log_monitor": False}
        head = {"include_dashboard": False, "no_monitor": True}  # no node comes by itself
        self._cluster = Cluster(initialize_head=True, head_node_args={**self._small, **head})
        self._second: Any = None
        self.add_one()
        self.address = str(self._cluster.address)

    def add_one(self) -> None:
        """Start the second node."""
        self._second = self._cluster.add_node(**self._small)

    def kill_one(self) -> None:
        """Kill all processes of the second node at once, if there is one."""
        if self._second is not None:
            self._cluster.remove_node(self._second, allow_graceful=False)
            self._second = None

    def stop(self) -> None:
        self._cluster.shutdown()


def started() -> Nodes:
    """On a busy machine Ray gives up a node before it has started, and is to be asked again."""
    for _ in range(2):
        with suppress(Exception):
            return Nodes()
    return Nodes()


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module", autouse=True)
def nodes(store: ObjectStore) -> Iterator[Nodes]:
    """One small cluster for all tests, which the command finds connected; its machines know the store."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:
        settings = {
            **NO_TOKEN,
            "RAY_prestart_worker_first_driver": "0",  # a process per CPU that nothing would use
            "RAY_worker_niceness": "0",  # else actors would wait for all other work of a busy machine
            "REPORTER_UPDATE_INTERVAL_MS": "60000",  # not 5000: nobody reads what a node's agent measures
            MARK: secrets.token_hex(8),
        }
        for key, value in settings.items():
            environment.setenv(key, value)
        cluster = started()
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.stop()


def actors() -> list[int]:
    """The processes of this module's cluster that hold a predictor."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes() and b"_Actor" in (process / "cmdline").read_bytes():
                pids.append(int(process.name))
    return pids
