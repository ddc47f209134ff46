"""Two processes with half of a batch each take the step that one takes with all of it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mpdsgr, small_recipe
from lightning_fabric import Fabric
from pydantic import ValidationError
from test_defence_sr import learned
from test_training import FORKED

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training.epoch import batch_loss
from mpdsgr_deploy.training.launch import run_processes, strategy
from mpdsgr_deploy.training.training_run import _learner

SHAPE, BATCH = (1, 8, 8), 16
HALVES = slice(0, 8), slice(8, 16)


def recipe_of(devices: int, **training: Any) -> Recipe:
    """Wide enough for more than one bucket of gradients."""
    return small_recipe(
        model={"width": 2.0},
        encoding={"T": 2},
        defence={"sr": {}},
        training={"accelerator": "cpu", "devices": devices, "batch_size": BATCH, **training},
    )


def steps(fabric: Fabric, recipes: dict[str, Recipe], out: Path) -> None:
    """Three steps of each recipe; rank 0 writes what they leave, each the gradients of its half of a batch.

    Two ranks end as a run that diverges does: by an error in each.
    """
    torch.set_num_threads(1)
    torch.save(gradients(fabric, HALVES[fabric.global_rank]), f"{out}-{fabric.global_rank}.pt")
    found = {name: after_three(fabric, recipe) for name, recipe in recipes.items()}
    if fabric.is_global_zero:
        torch.save(found, out)
    fabric.barrier()
    if fabric.world_size > 1:
        raise InputError("every rank says so")


def after_three(fabric: Fabric, recipe: Recipe) -> dict[str, Any]:
    """Losses and gradients of all, and the buffers; in float64 up to the loss, so that rounding flips no spikes."""
    draw = generator(0, "pixels")
    pixels = torch.randint(256, (BATCH, *SHAPE), dtype=torch.uint8, generator=draw)
    classes = torch.arange(BATCH) % 10
    learner = _learner(fabric, recipe, Images(pixels.numpy(), classes.numpy(), tuple(map(str, range(10)))))
    share = slice(fabric.global_rank, None, fabric.world_size)
    found: dict[str, Any] = {}
    for number in range(3):
        measured = batch_loss(learner, pixels[share], classes[share], 0, generator(0, "draw"))
        fabric.backward(measured["loss"])
        found |= {f"{number} {name}": fabric.all_reduce(value.detach()) for name, value in measured.items()}
        found |= {f"{number} gradient {name}": p.grad.clone() for name, p in learner.model.named_parameters()}
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    found |= {f"buffer {name}": buffer for name, buffer in learner.model.named_buffers()}
    if fabric.world_size > 1:
        found["ddp"] = learner.wrapped._forward_module._get_ddp_logging_data()
    return found


def gradients(fabric: Fabric, part: slice) -> list[torch.Tensor]:
    """Of a loss that is mostly sparsity regularisation, on a part of one batch."""
    _, model = learned({"sr": {"lam": 1.0}}, "direct", fabric, part)
    return [parameter.grad for parameter in model.parameters()]


def launched(recipes: dict[str, Recipe], out: Path) -> None:
    config = next(iter(recipes.values())).training
    fabric = Fabric(accelerator="cpu", devices=config.devices, strategy=strategy(config), precision="64-true")
    with pytest.raises(InputError, match=r"^every rank says so$") if config.devices > 1 else nullcontext():
        run_processes(fabric, steps, recipes, out)


def launched_two(out: str) -> None:
    """In a forked process: two ranks, forked from it."""
    joint = {"sync_norm": True}
    two = {"joint": joint, "joint, recomputed": joint | {"recompute": "layers"}, "each by itself": {}}
    launched({name: recipe_of(2, **training) for name, training in two.items()}, Path(out))


def test_joint_statistics_make_two_halves_one_batch(tmp_path: Path) -> None:
    launched({"one": recipe_of(1)}, tmp_path / "one")
    path, out = str(Path(__file__).parent), str(tmp_path / "two")
    two = f"import sys; sys.path.insert(0, {path!r}); import test_processes; test_processes.launched_two({out!r})"
    done = mpdsgr("--version", prelude=f"{FORKED}\n{two}")
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "one", weights_only=False)["one"]
    found = torch.load(tmp_path / "two", weights_only=False)
    buckets = [taken.pop("ddp") for taken in found.values()]
    alone = found.pop("each by itself")
    for name, taken in found.items():
        assert taken.keys() == one.keys()
        for what, value in one.items():
            torch.testing.assert_close(
                taken[what], value, rtol=2e-5, atol=1e-8, msg=lambda text, at=f"{name}, {what}": f"{at}: {text}"
            )
    what = "buffer body.0.norm.running_var"
    assert not torch.allclose(alone[what], one[what], rtol=1e-4)
    for ddp in buckets:
        assert ddp["gradient_as_bucket_view"] == 1
        assert ddp["find_unused_parameters"] == 0
        assert ddp["num_buckets_reduced"] == 2  # from the second step on, when their order is known
        assert ddp["backward_compute_comm_overlap_time"] > 0
    exchanged_of_every_pass(tmp_path)


def exchanged_of_every_pass(folder: Path) -> None:
    """DDP sees one of three passes of SR; parameters still get the mean of both whole gradients."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    alone = [gradients(fabric, half) for half in HALVES]
    for rank in (0, 1):
        for exchanged, first, second in zip(torch.load(folder / f"two-{rank}.pt"), *alone, strict=True):
            torch.testing.assert_close(exchanged, (first + second) / 2)


def test_other_norms_are_not_synchronised() -> None:
    with pytest.raises(ValidationError, match="sync_norm works only with"):
        small_recipe(model={"norm": "bn"}, training={"sync_norm": True})
