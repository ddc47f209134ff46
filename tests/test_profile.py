"""A profile of training: its parts, what they add up to, and that it changes nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mpdsgr_here, small_recipe

from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.profile import STEPS, WARM_UP

AT = {"at": {"eps": 0.1, "steps": 1, "step": 0.1}}


def profiled(out: Path, **training: Any) -> dict[str, Any]:
    recipe = small_recipe(
        data={"train_images": 130 * (WARM_UP + STEPS)},
        model={"width": 1.0},
        defence={**AT, "mpd-sgr": {"estimator": "empirical"}},
        training={"epochs": 1, "batch_size": 130, "accelerator": "cpu", **training},
    )
    train(recipe, out, profile=True)
    return json.loads((out / "profile" / "profile.json").read_text())


@pytest.fixture(scope="module", params=["none", "layers"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("profile") / "run"
    return out, profiled(out, recompute=request.param)


def test_every_part_has_its_time_and_together_they_are_the_step(found: tuple[Path, dict[str, Any]]) -> None:
    _, profile = found
    rows = {row["part"]: row for row in profile["parts"]}
    layers = [f"conv{n} {part}" for n in (1, 2, 3) for part in ("synapse", "norm", "neuron")]
    for name in (*layers, "2 AvgPool2d", "readout", "regulariser"):
        assert rows[name]["forward_ms"] > 0, name
        assert rows[name]["backward_ms"] > 0, name
    for name in ("data", "attack", "optimiser"):
        assert rows[name]["forward_ms"] > 0, name
        assert rows[name]["backward_ms"] == 0, name
    assert 0.8 < profile["explained"] <= 1.01
    assert profile["steps"] == STEPS
    assert profile["peak_mib"] > 50


def test_the_trace_opens_and_the_table_names_the_layers(found: tuple[Path, dict[str, Any]]) -> None:
    out, profile = found
    with gzip.open(out / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"conv1 synapse", "conv3 neuron", "attack", "optimiser"} <= set(names)
    lines = (out / "profile" / "profile.txt").read_text().splitlines()
    assert len(lines) == len(profile["parts"]) + 4
    assert any(line.startswith("conv2 norm ") for line in lines)


def test_time_on_the_way_back_is_that_of_the_layer_it_differentiates(tmp_path: Path) -> None:
    """A layer whose backward pass alone sleeps."""
    from lightning_fabric import Fabric

    from mpdsgr_deploy.data.batches import generator
    from mpdsgr_deploy.defences import build_defended
    from mpdsgr_deploy.training.epoch import Learner, train_epoch
    from mpdsgr_deploy.training.profile import Profile

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            torch.randn(500, 500) @ torch.randn(500, 500)
            for _ in range(30):
                torch.linalg.svd(torch.eye(100))
            return grads[0]

    class Synapse(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Slow.apply(self.inner(x))

    recipe = small_recipe(training={"batch_size": 8, "epochs": 1})
    model, defences = build_defended(recipe, (1, 8, 8), 10)
    layer = model.layers()[1]
    layer.synapse = Synapse(layer.synapse)
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    profile = Profile(model, tmp_path)
    learner = Learner(fabric, recipe, wrapped, model, defences, optimizer, profile)
    pixels = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8, generator=generator(0, "pixels"))
    train_epoch(learner, (pixels, torch.arange(48) % 10), 0)
    rows = json.loads((tmp_path / "profile.json").read_text())["parts"]
    slowest = max(rows, key=lambda row: row["backward_ms"])
    assert slowest["part"] == "conv2 synapse"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_profiled_run_is_the_same_run_and_no_profile_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    train(small_recipe(), tmp_path / "run", profile=True)
    same = {"seconds": 0, "cpu_seconds": 0, "peak_mib": 0}
    first, second = (
        [{**entry, **same} for entry in load_checkpoint(run / "last").history] for run in (run_dir, tmp_path / "run")
    )
    assert first == second
    assert not (run_dir / "profile").exists()


def test_a_run_of_too_few_steps_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(small_recipe(training={"epochs": 1, "batch_size": 585}), tmp_path / "run", profile=True)
    assert "it needs 5 training steps" in caplog.text
    assert not (tmp_path / "run" / "profile").exists()


def test_the_command_profiles(tmp_path: Path) -> None:
    settings = (
        "model.width=0.25",
        "encoding.T=2",
        "training.epochs=1",
        "training.pictures=0",
        "training.accelerator=cpu",
    )
    done = mpdsgr_here("train", "digits-reg", *(f"--set={s}" for s in settings), "--out", tmp_path / "run", "--profile")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "profile" / "profile.txt").exists()
    assert load_checkpoint(tmp_path / "run" / "last").history[-1]["peak_mib"] > 50
