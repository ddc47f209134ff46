"""Several nodes train one network: process groups on this machine that share a directory, as machines would."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_input_error, mpdsgr, mpdsgr_here
from ports import free_ports
from zygote import ADDRESS, address

from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Training, load_recipe
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.launch import find_launch

RECIPE = """
data = { name = "digits", augment = "none", train_images = 300 }
model = { name = "vgg-small", width = 0.25 }
encoding = { T = 2 }
training = { epochs = 2, pictures = 0, batch_size = 64, sync_norm = true, accelerator = "cpu", lr = 0.02 }
"""
CURVES = ("loss", "train_accuracy", "validation_accuracy", "cross_entropy")


# A second process group in the role of another machine. Each ends itself as soon as it sees the first epoch.
SECOND = """
import os, signal, threading, time
from pathlib import Path
os.environ["RANK"] = os.environ["GROUP_RANK"] = "1" if os.fork() == 0 else "0"
def watch():
    while not Path({state!r}).exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
"""


# Two agents of torchrun, one per machine, that find each other as the manual has it. Each starts the command once.
AGENTS = """
import os
from torch.distributed import run
child = os.fork()
run.main({arguments!r})
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
raise SystemExit(0)
"""

# What an agent starts: it hands the command and its environment to the process that has everything imported.
WORKER = """
import json, os, socket, sys
output = [f"{sys.argv[1]}/{name}{os.environ['RANK']}" for name in ("stdout", "stderr")]
job = dict(arguments=sys.argv[2:], cwd=os.getcwd(), environment=dict(os.environ), prelude="", output=output)
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["MPDSGR_TEST_ZYGOTE"])
connection.sendall((json.dumps(job) + "\\n").encode())
sys.exit(int(connection.makefile().readline()))
"""


def on_two_nodes(recipe: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    """The command, killed on both nodes after the first epoch, with the variables that torchrun sets."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return mpdsgr(*command(recipe, out), prelude=SECOND.format(state=str(out / "state.pt")), **meeting)


def by_torchrun(recipe: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    """The command by torchrun itself on two nodes; what both processes print."""
    folder = recipe.with_name("printed")
    folder.mkdir()
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}", "--local-addr=127.0.0.1"]
    started = ["--no-python", sys.executable, "-S", "-c", WORKER, str(folder), *map(str, command(recipe, out))]
    arguments = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=run", *meeting, *started]
    done = mpdsgr(prelude=AGENTS.format(arguments=arguments), **{ADDRESS: address()})
    printed = ("".join(path.read_text() for path in folder.glob(f"{name}*")) for name in ("stdout", "stderr"))
    done.stdout, done.stderr = (own + text for own, text in zip((done.stdout, done.stderr), printed, strict=True))
    return done


def command(recipe: Path, out: Path) -> list[object]:
    return ["train", recipe, "--set", "training.nodes=2", "--out", out, "--resume"]


def test_two_nodes_learn_what_one_does_though_they_are_killed(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "shared"
    recipe.write_text(RECIPE)
    assert on_two_nodes(recipe, out).returncode == -signal.SIGKILL
    done = by_torchrun(recipe, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 2  # of the last and the best checkpoint, by one node alone
    train(load_recipe(recipe), tmp_path / "one")
    two, one = (load_checkpoint(run / "last").history for run in (out, tmp_path / "one"))
    assert len(two) == len(one) == 2
    for entry, expected in zip(two, one, strict=True):
        assert [entry[name] for name in CURVES] == pytest.approx([expected[name] for name in CURVES], rel=1e-4)
    assert {path.name for path in out.iterdir()} - {".lock"} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize(
    ("settings", "variables", "expected"),
    [
        ({}, {"WORLD_SIZE": "2"}, "torchrun started 2 processes, but .* for training.nodes=1 times"),
        ({"nodes": 2}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "set both to what the launcher starts"),
        ({"nodes": 2}, {"WORLD_SIZE": "2", "RANK": "0"}, "only through torchrun or srun"),
        ({"devices": 2}, {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 .* only through torchrun or srun"),
        ({"nodes": 2}, {}, "start mpdsgr train with torchrun or srun, or once on each node with MASTER_ADDR"),
        ({"nodes": 2}, {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "2"}, "the last from 0 to 1"),
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
    ],
)
def test_processes_that_do_not_fit_the_recipe_are_refused(
    settings: dict[str, int], variables: dict[str, str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        find_launch(Training(**settings), variables)


def test_each_launcher_is_joined() -> None:
    two = Training(nodes=2)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    by_torchrun = {**meeting, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_launch(two, by_torchrun)[1:] == (True, False)
    assert find_launch(two, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})[1:] == (True, True)
    assert find_launch(two, {**meeting, "NODE_RANK": "1"})[1:] == (False, False)
    assert find_launch(Training(), {"WORLD_SIZE": "1", "RANK": "0"})[1:] == (False, True)
    batch_script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}  # its own process, before any srun
    assert find_launch(Training(devices=4), batch_script)[1:] == (False, True)


def test_slurm_settings_that_differ_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEP_NUM_TASKS": "2", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = ["train", "digits-reg", "--set", "training.nodes=2", "--out", tmp_path / "run"]
    assert_input_error(mpdsgr_here(*command), "Use `--ntasks-per-node=2` instead")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert_input_error(mpdsgr_here(*command), "`--nodes=1` does not match")


def test_the_manual_starts_it_by_torchrun_and_slurm() -> None:
    manual = (Path(__file__).parent.parent / "train" / "README.md").read_text()
    assert re.search(r"torchrun --nnodes 2 .*\n.*training\.nodes=2", manual)
    assert "#SBATCH --nodes=2" in manual
