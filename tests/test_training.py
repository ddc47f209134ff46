"""Training: resumable bit for bit, on one process or two, and never at the cost of the last checkpoint."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_input_error, mpdsgr, small_recipe
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.snn import TdBN
from mpdsgr_deploy.trained_networks import load_model
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.epoch import cosine

MEASURED = {"seconds", "cpu_seconds", "peak_mib"}  # differ from run to run
SETTINGS = ("model.width=0.25", "encoding.T=2", "training.epochs=2", "training.pictures=0")
TINY = ["digits-mpdsgr", *(word for setting in SETTINGS for word in ("--set", setting))]


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(run / which)
    return load_file(run / which / checkpoint.weights)


def assert_same_run(one: Path, other: Path) -> None:
    for which in ("last", "best"):
        first, second = weights(one, which), weights(other, which)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def curve(run: Path) -> list[dict[str, object]]:
        return [
            {**entry, "seconds": None, "cpu_seconds": None, "peak_mib": None}
            for entry in load_checkpoint(run / "last").history
        ]

    assert curve(one) == curve(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "whole"
    assert mpdsgr("train", *TINY, "--out", out).returncode == 0
    return out


def test_killed_mid_epoch_and_resumed_is_bit_identical(uninterrupted: Path, tmp_path: Path) -> None:
    """In the second step of the second epoch."""
    killed = f"""
import os, signal, torch
from pathlib import Path
steps, step = 0, torch.optim.Optimizer.zero_grad
def killing(*arguments, **options):
    global steps
    steps += Path({str(tmp_path / "run" / "state.pt")!r}).exists()
    if steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **options)
torch.optim.Optimizer.zero_grad = killing
"""
    assert mpdsgr("train", *TINY, "--out", tmp_path / "run", prelude=killed).returncode == -signal.SIGKILL
    assert len(load_checkpoint(tmp_path / "run" / "last").history) == 1
    assert mpdsgr("train", *TINY, "--out", tmp_path / "run", "--resume").returncode == 0
    assert_same_run(uninterrupted, tmp_path / "run")


# Each atomic write of an epoch ends in one os.replace; the process dies before the n-th of them. The first is
# recipe.json, then weights and JSON of best and of last, then state.pt, epoch after epoch.
@pytest.mark.parametrize("dies_before", [1, 3, 6, 10])
def test_killed_mid_write_and_resumed_is_bit_identical(uninterrupted: Path, tmp_path: Path, dies_before: int) -> None:
    dying = f"""
import os
count, replace = 0, os.replace
def dying(source, target):
    global count
    count += 1
    if count == {dies_before}:
        os._exit(9)
    replace(source, target)
os.replace = dying
"""
    assert mpdsgr("train", *TINY, "--out", tmp_path / "run", prelude=dying).returncode == 9
    assert mpdsgr("train", *TINY, "--out", tmp_path / "run", "--resume").returncode == 0
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("which", ["weights", "state"])
def test_a_full_disk_is_one_line_and_what_was_there_survives(which: str, tmp_path: Path) -> None:
    """A file-size limit makes every larger write fail as a full disk does."""
    arguments = [*TINY, "--set", "training.epochs=3", "--out", str(tmp_path / "run")]
    assert mpdsgr("train", *arguments, "--set", "training.epochs=1").returncode == 0
    before = load_checkpoint(tmp_path / "run" / "last")
    largest = (tmp_path / "run" / "state.pt").stat().st_size
    limit = largest - 1 if which == "state" else largest // 4
    (tmp_path / "run" / "recipe.json").write_text(
        (tmp_path / "run" / "recipe.json").read_text().replace('"epochs": 1', '"epochs": 3')
    )
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = mpdsgr("train", *arguments, "--resume", prelude=limited)
    assert_input_error(done, "cannot write", "unchanged")
    assert len(load_checkpoint(tmp_path / "run" / "last").history) == len(before.history) + (which == "state")
    assert len(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["history"]) == 1
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_disk_that_pictures_fill_is_one_line_and_the_run_goes_on(tmp_path: Path) -> None:
    """TensorBoard writes in a thread, whose traceback says nothing that the line does not. The last epoch draws."""
    run = tmp_path / "run"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    command = ["train", *TINY, "--set", "training.pictures=10", "--out", run]
    assert_input_error(mpdsgr(*command, prelude=limited), "cannot write", "tensorboard", "--resume")
    assert len(load_checkpoint(run / "last").history) == 1
    assert mpdsgr(*command, "--resume").returncode == 0


# Forked, two processes need not import torch again. What they are handed is pickled, as for spawned ones.
FORKED = """
import pickle
from lightning_fabric import Fabric
from mpdsgr_deploy.training import launch
Strategy, launched = launch.DDPStrategy, Fabric.launch
launch.DDPStrategy = lambda start_method, **options: Strategy(start_method="fork", **options)
Fabric.launch = lambda self, *handed: launched(self, *pickle.loads(pickle.dumps(handed)))
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """One validation batch for two ranks: the rank without one must not keep the other waiting."""
    arguments = [
        "--set",
        "training.devices=2",
        "--set",
        "training.accelerator=cpu",
        "--set",
        "training.sync_norm=true",
        "--set",
        "training.recompute=layers",
        "--set",
        "validation.batch_size=130",
    ]
    done = mpdsgr("train", *TINY, *arguments, "--out", tmp_path / "run", "--json", prelude=FORKED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["validation_accuracy"] > 0.5
    assert done.stderr.count("epoch 2 ") == 1  # one process reports


def test_accumulation_adds_up_to_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """tdBN's batch statistics differ between one batch and two halves, so it is kept in eval mode here."""
    monkeypatch.setattr(TdBN, "training", property(lambda self: False, lambda self, mode: None), raising=False)
    from lightning_fabric import Fabric

    from mpdsgr_deploy.models import build_model
    from mpdsgr_deploy.training.epoch import Learner, train_epoch

    def stepped(accumulate: int) -> torch.Tensor:
        recipe = small_recipe(training={"accumulate": accumulate, "batch_size": 64, "epochs": 1})
        torch.manual_seed(0)
        model = build_model(recipe, (1, 8, 8), 10)
        fabric = Fabric(accelerator="cpu", devices=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        draw = torch.Generator().manual_seed(0)
        data = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8, generator=draw), torch.arange(64) % 10
        train_epoch(Learner(fabric, recipe, wrapped, model, [], optimizer), data, 0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(stepped(1), stepped(2), rtol=1e-5, atol=1e-6)


def test_regularised_training_lowers_omega_and_adversarial_training_scores_attacked(
    tmp_path: Path, run_dir: Path
) -> None:
    train(small_recipe(defence={"mpd-sgr": {"estimator": "empirical", "eta": 5.0}}), tmp_path / "mpd")
    train(small_recipe(defence={"at": {"eps": 0.1, "step": 0.05}}), tmp_path / "at")
    plain, mpd, at = (
        load_checkpoint(path / "last").history[-1] for path in (run_dir, tmp_path / "mpd", tmp_path / "at")
    )

    def omega(entry: dict[str, object]) -> float:
        return sum(layer["omega_empirical"] for layer in entry["layers"]) / len(entry["layers"])

    assert omega(mpd) < 0.8 * omega(plain)
    assert mpd["loss"] == pytest.approx(mpd["cross_entropy"] + 5 * mpd["omega"], rel=1e-4)
    assert plain["score"] == plain["validation_accuracy"]
    assert at["score"] < at["validation_accuracy"]


def test_the_best_checkpoint_is_the_best_validation_score_and_never_saw_the_test_set(run_dir: Path) -> None:
    last, best = load_checkpoint(run_dir / "last"), load_checkpoint(find_checkpoint(run_dir, "best"))
    assert best.metrics["score"] == max(entry["score"] for entry in last.history)
    _, validation = load_training(best.recipe.data)
    model = load_model(run_dir / "best" / best.weights, best.recipe, best.shape, 10)
    with torch.no_grad():
        found = model(torch.from_numpy(validation.unit())).argmax(1).numpy()
    assert (found == validation.classes).mean() == pytest.approx(best.metrics["validation_accuracy"], abs=0.01)
    assert "/" not in best.recipe.data.root


def test_the_last_checkpoint_is_the_default_and_each_says_which_it_is(run_dir: Path) -> None:
    last, best = load_checkpoint(find_checkpoint(run_dir)), load_checkpoint(find_checkpoint(run_dir, "best"))
    assert (last.choice, last.epoch, last.origin) == ("last", 3, "last checkpoint (epoch 3 of 3)")
    assert best.choice == "best"
    assert best.origin == (
        f"best checkpoint (epoch {best.epoch} of 3; highest accuracy on 130 validation images, clean: "
        f"{best.metrics['score']:.1%})"
    )
    assert find_checkpoint(run_dir / "best") == run_dir / "best"
    with pytest.raises(InputError, match="is itself a checkpoint; give its training run"):
        find_checkpoint(run_dir / "last", "best")


def test_tensorboard_has_the_curves_and_no_pictures_where_none_are_asked_for(uninterrupted: Path) -> None:
    events = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    assert events.Tags()["images"] == []
    tags = set(events.Tags()["scalars"])
    wanted = {
        "loss",
        "train_accuracy",
        "validation_accuracy",
        "firing_rate/conv1",
        "omega_theorem/conv2",
        "scale/conv3",
    }
    assert wanted <= tags
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


def test_mixed_precision_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    defence = {"mpd-sgr": {"estimator": "empirical"}}
    train(small_recipe(training={"precision": "bf16-mixed"}, defence=defence), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last").history[-1]["validation_accuracy"] > 0.5
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_cosine_schedule() -> None:
    assert [cosine(0.1, s, 4) for s in (0, 2, 4)] == pytest.approx([0.1, 0.05, 0.0])


BLOCKS = """
import ctypes, resource, threading
from mpdsgr_deploy.allocator import keep_pages
libc, block = ctypes.CDLL(None), ctypes.c_void_p()
libc.memset.argtypes, libc.free.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)
{first}
def blocks():
    for _ in range(3):
        for size in (1 << 24, 1 << 25):
            libc.posix_memalign(ctypes.byref(block), 64, size)  # as torch does for a tensor on the CPU
            libc.memset(block, 0, size)
            libc.free(block)
def step():
    blocks()
    backward = threading.Thread(target=blocks)
    backward.start()
    backward.join()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_blocks_that_are_asked_for_again_need_no_new_pages() -> None:
    def faults(first: str) -> int:
        code = BLOCKS.format(first=first)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert faults("keep_pages()") < faults("") / 3  # of four steps: one may meet a heap that could not grow in place
