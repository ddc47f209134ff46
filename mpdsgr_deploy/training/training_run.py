"""Train a recipe in an output directory, on one or more devices.

    OUT/recipe.json           the resolved recipe, which marks the directory as a training run
    OUT/state.pt              what a resumed run needs
    OUT/best, OUT/last        checkpoints, see training_state.py
    OUT/tensorboard           curves, warnings, pictures of membrane potentials
    OUT/profile               the profile of the first steps, if requested

All random numbers are a function of (seed, purpose, epoch, step), so a resumed run repeats the interrupted epoch: bit
for bit on a CPU, and up to the order in which cuDNN adds on a GPU.
"""

import copy
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.checkpoint import Checkpoint
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.data import Images, load_training
from mpdsgr_deploy.data.batches import to_device
from mpdsgr_deploy.defences import Defence, build_defended, resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.models.time_steps import set_time_steps
from mpdsgr_deploy.progress import log, show_progress
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import parse, read_json
from mpdsgr_deploy.snn import TdBN
from mpdsgr_deploy.training.board import display, open_board
from mpdsgr_deploy.training.epoch import Data, Learner, attack_epoch, settle_average, train_epoch, validate_epoch
from mpdsgr_deploy.training.identity import data_identity, refuse_changes, refuse_other_nodes
from mpdsgr_deploy.training.launch import find_launch, make_fabric, run_processes
from mpdsgr_deploy.training.preflight import preflight
from mpdsgr_deploy.training.profile import Profile, peak_memory
from mpdsgr_deploy.training.stages import recipe_at
from mpdsgr_deploy.training.training_state import STATE, begin, save

RECIPE = "recipe.json"
Origin = Path | str  # origin of the first weights: the directory of a trained network, or package.module:function


def origin(text: str | os.PathLike[str]) -> Origin:
    """Return the name of a torch module (package.module:function) unchanged, and any other text as a path."""
    name = os.fspath(text)
    return name if ":" in name and not Path(name).exists() else Path(name)


def train(
    recipe: Recipe, out: Path, *, resume: bool = False, profile: bool = False, init: Origin | None = None
) -> bool:
    """Train `recipe` into directory `out`; return whether this process leads the run and wrote `out`.

    In a run on several nodes or by a launcher, each process calls this function with the same `out`, which all nodes
    share, and one of them leads.
    resume: continue an interrupted run of the same recipe after its last finished epoch, or start one.
    profile: write the profile of the first steps to out/profile.
    init: the origin of the first weights in place of random ones: the directory of a run, a checkpoint or a bundle, or
        the name of a torch module (package.module:function). For a resumed run it must be what that run started from.

    Raises InputError for an `out` that holds other files or (without `resume`) a run, a changed recipe, missing data or
    hardware, processes that do not fit the recipe or cannot reach each other, and a disk that cannot be written.
    """
    need("matplotlib", "train")  # needed only after the first epoch, which is too late to fail
    recipe = resolved(recipe)
    launch = find_launch(recipe.training, os.environ)
    with _claimed(out) if launch.leads else nullcontext():
        if (out / STATE).exists():
            if not resume:
                raise InputError(
                    f"{out} already holds a training run; continue it with --resume or choose another --out"
                )
            before = parse(Recipe, read_json(out / RECIPE, otherwise="start again in another --out"), str(out / RECIPE))
            refuse_changes(resolved(before), recipe.portable(), out)
        if launch.leads:
            write_atomic(out / RECIPE, recipe.portable().model_dump_json(indent=1).encode())
        training, validation = load_training(recipe.data)
        preflight(recipe, training)
        fabric = make_fabric(recipe.training, launch)
        verbose = log.isEnabledFor(logging.INFO)
        run_processes(fabric, _run, recipe, training, validation, out, init, verbose, profile)
    return launch.leads


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Claim a directory for a training run, and keep other processes from writing to it during the block."""
    claim_directory(out, RECIPE, "training run")
    with exclusive(out / LOCK, "mpdsgr train"):
        yield


def _run(
    fabric: Fabric,
    recipe: Recipe,
    training: Images,
    validation: Images,
    out: Path,
    init: Origin | None,
    verbose: bool,
    profile: bool,
) -> None:
    if not fabric.is_global_zero:
        log.setLevel(logging.WARNING)
    elif verbose:
        show_progress()  # a spawned process does not inherit the caller's logging
    learner = _learner(fabric, recipe, training)
    data = data_identity(training, validation)
    history, started_from = begin(learner, training, out, init, data)
    refuse_other_nodes(fabric, out, len(history), data)
    if len(history) >= recipe.training.epochs:
        log.info("%s already has all of its %d epochs", out, recipe.training.epochs)
        return
    if profile and fabric.is_global_zero:
        learner = learner._replace(profile=Profile(learner.model, out / "profile"))
    train_data, validation_data = to_device(training, fabric.device), to_device(validation, fabric.device)
    log.info(
        "training %s (%d parameters) on %d %s images, validating on %d; epochs %d to %d",
        recipe.model.name,
        sum(p.numel() for p in learner.model.parameters()),
        len(training),
        recipe.data.name,
        len(validation),
        len(history) + 1,
        recipe.training.epochs,
    )
    folder, first = out / "tensorboard", len(history) + 1
    with open_board(folder, first) if fabric.is_global_zero else nullcontext() as board:
        for epoch in range(len(history), recipe.training.epochs):
            staged = recipe_at(recipe, epoch)
            for defence in learner.defences:
                defence.begin_epoch(history)
            history.append(_one_epoch(learner, staged, train_data, validation_data, epoch))
            if board is not None:
                display(board, learner, history, validation_data)
                scored = score_of(learner, len(validation))
                save(learner, _checkpoint(staged, training, history, scored, started_from), data, out)
            fabric.barrier()
    if learner.profile is not None:
        learner.profile.close()


def _checkpoint(
    staged: Recipe, training: Images, history: list[dict[str, Any]], scored: str, started_from: dict[str, Any] | None
) -> Checkpoint:
    """Return the checkpoint of the last epoch in `history`, without its weights."""
    return Checkpoint(
        recipe=staged.portable(),
        shape=training.shape,
        labels=training.labels,
        epoch=len(history),
        choice="last",
        score_of=scored,
        metrics={name: history[-1][name] for name in ("validation_accuracy", "score")},
        history=history,
        provenance=provenance(),
        init=started_from,
    )


def _one_epoch(learner: Learner, staged: Recipe, training: Data, validation: Data, epoch: int) -> dict[str, Any]:
    """Train and validate for an epoch at the time steps of `staged`; return its entry of the history.

    epoch: counted from 0. In the entry, `seconds` is wall time, and `cpu_seconds` the CPU time of this process, which
    other programs on the machine hardly affect.
    """
    started, computed = time.perf_counter(), time.process_time()
    shape = training[0].shape[1:]
    for model in {learner.model, learner.judged}:
        set_time_steps(model, staged, (shape[0], shape[1], shape[2]))
    learned = train_epoch(learner, training, epoch)
    settle_average(learner, training, epoch)
    validated, layers = validate_epoch(learner, validation, epoch)
    return {
        "epoch": epoch + 1,
        "T": staged.encoding.T,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - computed, 2),
        "peak_mib": round(peak_memory() / 2**20, 1),
        **learned,
        **validated,
        **attack_epoch(learner, validation, epoch),
        "layers": [layer._asdict() for layer in layers],
    }


def _learner(fabric: Fabric, recipe: Recipe, training: Images) -> Learner:
    """Return the untrained network and its optimiser, on the device of this process."""
    config = recipe.training
    torch.manual_seed(config.seed)
    model, defences = build_defended(recipe, training.shape, len(training.labels))
    model.normalize.set(*training.statistics())
    model.recompute = config.recompute == "layers"
    for layer in model.layers():
        if isinstance(layer.norm, TdBN):
            layer.norm.synchronised = config.sync_norm
    model = model.to(memory_format=torch.channels_last)  # convolutions are fastest in this layout
    undecayed = [p for defence in defences for p in defence.undecayed(model)]
    undecayed_ids = {id(p) for p in undecayed}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in undecayed_ids]}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    plain = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    average = copy.deepcopy(model).requires_grad_(False).to(fabric.device) if config.average else None
    wrapped, optimizer = fabric.setup(model, plain)
    return Learner(fabric, recipe, wrapped, model, defences, optimizer, average=average)


def score_of(learner: Learner, images: int) -> str:
    """Describe the score of `validate_epoch`, by which the best checkpoint of a run is chosen."""
    attacked = any(type(defence).examples is not Defence.examples for defence in learner.defences)
    return f"accuracy on {images} validation images, {'under the training attack' if attacked else 'clean'}"
