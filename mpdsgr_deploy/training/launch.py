"""The processes of a training run: one per device of every node, started by this one, by torchrun or by srun."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch.distributed import DistError
from torch.multiprocessing.spawn import ProcessRaisedException

from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.recipe import Training

# Launchers by the environment variable that holds the number of processes they started
LAUNCHERS = {
    "WORLD_SIZE": "torchrun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
MEETING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # where the nodes of a run meet, and the number of this node


class Launch(NamedTuple):
    """How the processes of a run start.

    environment: Fabric's description of the launcher. started: whether a launcher started all processes. leads: whether
    this process, or the first process that it starts, writes the files.
    """

    environment: type[ClusterEnvironment]
    started: bool
    leads: bool


def find_launch(config: Training, variables: Mapping[str, str]) -> Launch:
    """Return the launch that `variables`, the environment of this process, describe.

    Raises InputError if they do not fit `training.nodes` and `training.devices`: every process would then train alone.
    """
    for variable, launcher in LAUNCHERS.items():
        count = variables.get(variable, "1")
        if count.isdigit() and int(count) > 1:
            return _started(config, variables, launcher, int(count))
    if config.nodes > 1:
        number = variables.get(MEETING[-1], "")
        if not all(map(variables.get, MEETING)) or number not in map(str, range(config.nodes)):
            raise InputError(
                f"training.nodes={config.nodes} needs a launcher: start mpdsgr train with torchrun or srun, or "
                f"once on each node with {', '.join(MEETING)} set, the last from 0 to {config.nodes - 1}"
            )
        return Launch(LightningEnvironment, started=False, leads=number == "0")
    return Launch(LightningEnvironment, started=False, leads=True)


def _started(config: Training, variables: Mapping[str, str], launcher: str, count: int) -> Launch:
    how = f"{launcher} started {count} processes"
    on_node = int(variables.get("LOCAL_WORLD_SIZE", config.devices))  # set by torchrun: the processes on this node
    if (count, on_node) != (config.processes, config.devices):
        raise InputError(
            f"{how}, but the recipe asks for training.nodes={config.nodes} times training.devices={config.devices} "
            f"(processes per node); set both to what the launcher starts"
        )
    if launcher == "torchrun" and {"RANK", "LOCAL_RANK", *MEETING[:2]} <= variables.keys():
        return Launch(TorchElasticEnvironment, started=True, leads=variables["RANK"] == "0")
    if launcher == "srun":
        return Launch(SLURMEnvironment, started=True, leads=variables.get("SLURM_PROCID") == "0")
    raise InputError(
        f"{how}, but the processes of a run can find each other only through torchrun or srun; use one of them"
    )


def make_fabric(config: Training, launch: Launch) -> Fabric:
    """Return the Fabric of this process. Raises InputError for missing hardware or conflicting launcher settings."""
    try:
        environment = launch.environment()
        environment.validate_settings(config.devices, config.nodes)
        return Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=strategy(config, started=launch.started),
            precision=config.precision,
            plugins=[environment],
        )
    except Exception as error:  # Fabric has no common error type for missing hardware
        raise InputError(
            f"training.accelerator={config.accelerator}, nodes={config.nodes}, devices={config.devices}: "
            f"{one_line(error)}"
        ) from error


def strategy(config: Training, *, started: bool = False) -> Strategy | str:
    """Return Fabric's strategy for the processes of a run: "auto" for a single one, else DDP.

    started: whether a launcher started the processes. DDP exchanges gradients in buckets during the backward pass, of
    which gradients are views. Every parameter gets a gradient in every step, so DDP need not search for unused ones. It
    copies buffers, such as running statistics, from process 0 to the others.
    """
    if config.processes == 1:
        return "auto"
    method: Any = "popen" if started else "spawn"
    return DDPStrategy(start_method=method, find_unused_parameters=False, gradient_as_bucket_view=True)


def run_processes(fabric: Fabric, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(fabric, *arguments)` in this process, or in each process that it starts for its devices.

    function: defined at the top level of a module, so that other processes can import it. Raises the InputError that
    `function` raised, and InputError if the processes cannot reach each other.
    """
    try:
        fabric.launch(function, *arguments)
    except DistError as error:
        raise _unconnected(str(error)) from error
    except ProcessRaisedException as error:  # its message ends with the traceback of the process that failed
        ours = re.search(rf"{InputError.__module__}\.InputError: (.*)", str(error))
        lost = re.search(r"torch\.distributed\.Dist\w*Error: (.*)", str(error))
        if ours is None and lost is None:
            raise
        raise (InputError(ours[1]) if ours else _unconnected(str(lost and lost[1]))) from None


def _unconnected(reason: str) -> InputError:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return InputError(f"the processes of this run cannot reach each other at {place}: {one_line(reason)[:200]}")
