"""A training run: its output directory, its devices, its epochs, its resumption.

    OUT/recipe.json       the resolved recipe; marks the directory as ours
    OUT/state.pt          everything a resumed run needs, replaced atomically after every epoch
    OUT/best  OUT/last    checkpoints, by validation score and by age
    OUT/tensorboard       curves

Randomness is a function of (seed, purpose, epoch, step), so a resumed run repeats the interrupted epoch bit for bit.
"""

import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.tensorboard import SummaryWriter

from mpdsgr_deploy.checkpoint import Checkpoint, save_checkpoint
from mpdsgr_deploy.data import Images, load_training
from mpdsgr_deploy.data.batches import to_device
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import claim_directory, write_atomic
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.mpd import ESTIMATORS
from mpdsgr_deploy.progress import log, show_progress
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training.epoch import Learner, train_epoch, validate_epoch

RECIPE, STATE = "recipe.json", "state.pt"


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> None:
    """Train what `recipe` describes into directory `out`.

    resume continues an interrupted run of the same recipe from its last finished epoch (or starts one).
    Raises InputError for a directory that is not ours or already holds a run, a changed recipe, missing data or
    hardware, a full disk.
    """
    claim_directory(out, RECIPE, "training run")
    if (out / STATE).exists():
        if not resume:
            raise InputError(f"{out} already holds a training run; continue it with --resume or choose another --out")
        _refuse_changes(json.loads((out / RECIPE).read_bytes()), recipe.portable().model_dump(mode="json"), out)
    write_atomic(out / RECIPE, recipe.portable().model_dump_json(indent=1).encode())
    training, validation = load_training(recipe.data)
    _check(recipe, training)
    config = recipe.training
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp_spawn" if config.devices > 1 else "auto",
            precision=config.precision,
        )
    except Exception as error:  # Fabric has no common error type for hardware that is not there
        raise InputError(f"training.accelerator={config.accelerator}, devices={config.devices}: {error}") from error
    # a module-level function, because devices > 1 pickles it to new processes; Fabric's hint knows one argument only
    fabric.launch(_run, recipe, training, validation, out, log.isEnabledFor(logging.INFO))  # type: ignore[arg-type]


def _check(recipe: Recipe, training: Images) -> None:
    """Mistakes that would otherwise surface inside the processes of a run."""
    with torch.device("meta"):
        build_model(recipe, training.shape, len(training.labels))
    choose("estimator", ESTIMATORS, recipe.regularizer.estimator)
    batch_size = recipe.training.batch_size
    if batch_size > len(training):
        raise InputError(f"training.batch_size is {batch_size}, but there are only {len(training)} training images")


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    changed = [f"{s}.{k}" for s in now for k in now[s] if before.get(s, {}).get(k) != now[s][k]]
    if changed:
        raise InputError(f"{out} was trained with other values of {', '.join(changed)}; resume with the same recipe")


def _run(fabric: Fabric, recipe: Recipe, training: Images, validation: Images, out: Path, verbose: bool) -> None:
    """What every process of the run does."""
    if not fabric.is_global_zero:
        log.setLevel(logging.WARNING)
    elif verbose:
        show_progress()  # a spawned process starts without the caller's logging
    torch.manual_seed(recipe.training.seed)
    model = build_model(recipe, training.shape, len(training.labels))
    model.normalize.set(*training.statistics())
    model = model.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.training.lr,
        momentum=recipe.training.momentum,
        weight_decay=recipe.training.weight_decay,
    )
    state = _load_state(out / STATE)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    first = len(state["history"]) if state else 0
    history: list[dict[str, Any]] = state["history"] if state else []
    wrapped, optimizer = fabric.setup(model, optimizer)
    learner = Learner(fabric, recipe, wrapped, model, optimizer)
    train_data, validation_data = to_device(training, fabric.device), to_device(validation, fabric.device)
    board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1) if fabric.is_global_zero else None
    log.info(
        "training %s (%d parameters) on %d %s images, validating on %d; epochs %d to %d",
        recipe.model.name,
        sum(p.numel() for p in model.parameters()),
        len(training),
        recipe.data.name,
        len(validation),
        first + 1,
        recipe.training.epochs,
    )
    for epoch in range(first, recipe.training.epochs):
        started = time.perf_counter()
        learned = train_epoch(learner, train_data, epoch)
        validated, layers = validate_epoch(learner, validation_data, epoch)
        entry = {
            "epoch": epoch + 1,
            "seconds": round(time.perf_counter() - started, 2),
            **learned,
            **validated,
            "layers": [layer._asdict() for layer in layers],
        }
        history.append(entry)
        if board is not None:
            _log_epoch(board, entry)
            checkpoint = Checkpoint(
                recipe=recipe.portable(),
                shape=training.shape,
                labels=training.labels,
                epoch=epoch + 1,
                metrics=validated,
                history=history,
                provenance=provenance(),
            )
            # the state goes last: whatever of this epoch was not written yet, a resumed run writes again
            if entry["score"] >= max(e["score"] for e in history):
                save_checkpoint(out / "best", checkpoint, model.state_dict())
            save_checkpoint(out / "last", checkpoint, model.state_dict())
            _save_state(out / STATE, model, optimizer, history)
        fabric.barrier()
    if board is not None:
        board.close()


def _save_state(path: Path, model: torch.nn.Module, optimizer: Any, history: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}, buffer)
    write_atomic(path, buffer.getvalue())


def _load_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise InputError(f"{path} is damaged ({error}); start again in another --out") from error
    return state


def _log_epoch(board: SummaryWriter, entry: dict[str, Any]) -> None:
    epoch = entry["epoch"]
    for name, value in entry.items():
        if isinstance(value, float):
            board.add_scalar(name, value, epoch)
    for layer in entry["layers"]:
        for name, value in layer.items():
            if isinstance(value, float):
                board.add_scalar(f"{name}/{layer['layer']}", value, epoch)
    board.flush()
    log.info(
        "epoch %d  %.0f s  loss %.3f  train %.1f %%  validation %.1f %%%s  omega %.3f  firing rate %.3f",
        epoch,
        entry["seconds"],
        entry["loss"],
        100 * entry["train_accuracy"],
        100 * entry["validation_accuracy"],
        f" ({100 * entry['score']:.1f} % attacked)" if entry["score"] != entry["validation_accuracy"] else "",
        sum(layer["omega_empirical"] for layer in entry["layers"]) / len(entry["layers"]),
        sum(layer["firing_rate"] for layer in entry["layers"]) / len(entry["layers"]),
    )
