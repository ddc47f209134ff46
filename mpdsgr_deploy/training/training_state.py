"""Save a training run after every epoch, and start or continue one.

OUT/state.pt            everything that a resumed run needs, replaced atomically after every epoch
OUT/best, OUT/last      the checkpoints of the best validation score and of the latest epoch
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.bundle import MANIFEST, WEIGHTS, open_bundle
from mpdsgr_deploy.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import InputError, explained
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.models.module_by_name import find_module
from mpdsgr_deploy.models.time_steps import per_step_names
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training.epoch import Learner
from mpdsgr_deploy.training.identity import refuse_other_data
from mpdsgr_deploy.training.module_init import mapped_weights, start_from_module, weights_sha256

STATE = "state.pt"
COMPARED = 500  # training images on which a module and the network that starts from it are compared


class Past(NamedTuple):
    """The past of a run: the history entries of its finished epochs, and the origin of its first weights.

    init: None for random weights; else what `load_init` returned.
    """

    history: list[dict[str, Any]]
    init: dict[str, Any] | None = None


class TrainedWeights(NamedTuple):
    """A safetensors file of weights, and facts about the network and its training.

    sha256: of the file. shape: (C, H, W) of the images. epoch: the epoch, counted from 1, after which the weights were
    saved. init: the `Checkpoint.init` of that training, which bundles do not record.
    """

    file: Path
    sha256: str
    recipe: Recipe
    shape: tuple[int, int, int]
    labels: tuple[str, ...]
    epoch: int
    provenance: dict[str, Any]
    init: dict[str, Any] | None = None


def find_weights(path: Path) -> TrainedWeights:
    """Find the weights in a bundle, a training run (its last epoch's) or a checkpoint.

    Raises InputError as `open_bundle` and `load_checkpoint` do, for a directory that is none of these, and for a bundle
    whose network was not trained by this package.
    """
    if (path / MANIFEST).is_file():
        return _of_bundle(path)
    directory = find_checkpoint(path)
    checkpoint = load_checkpoint(directory)
    file = directory / checkpoint.weights
    return TrainedWeights(
        file,
        checkpoint.weights_sha256,
        checkpoint.recipe,
        checkpoint.shape,
        checkpoint.labels,
        checkpoint.epoch,
        checkpoint.provenance,
        checkpoint.init,
    )


def _of_bundle(path: Path) -> TrainedWeights:
    bundle = open_bundle(path)
    manifest, history = bundle.manifest, bundle.manifest.provenance
    return TrainedWeights(
        bundle.weights("give --init the torch module it was made from (package.module:function)"),
        manifest.files[WEIGHTS],
        manifest.recipe,
        manifest.input_shape,
        manifest.labels,
        history["epoch"],
        history["training"],
    )


def begin(learner: Learner, training: Images, out: Path, init: Path | str | None, data: dict[str, Any]) -> Past:
    """Load the state of the run in `out` into the learner; without one, load the weights of `init`, if given.

    Call this after Fabric's set-up, so that the optimiser's buffers are on the device of its parameters.
    init: the directory of a run, a checkpoint or a bundle, or the name of a torch module (package.module:function).
    data: the `identity.data_identity` of the run's images.

    Raises InputError for a damaged state, weights of another network, and other images or another `init` than the run
    started with.
    """
    if not (out / STATE).exists():
        return Past([], None if init is None else load_init(learner, training, init))
    past = _restore(learner, out / STATE, data)
    if init is not None:
        if isinstance(init, Path):
            sha256 = find_weights(init).sha256
        else:
            sha256 = weights_sha256(mapped_weights(find_module(init), learner.model))
        if past.init is None or past.init["weights_sha256"] != sha256:
            raise InputError(f"{out} did not start from the weights in {init}; resume without --init")
    return past


def _restore(learner: Learner, path: Path, data: dict[str, Any]) -> Past:
    def damaged(error: Exception) -> InputError:
        return InputError(f"{path} is damaged ({type(error).__name__}); start again in another --out")

    with explained(damaged):
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_other_data(state.get("data"), data, path.parent)
        learner.model.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
        if learner.average is not None:
            learner.average.load_state_dict(state["average"])
        return Past(state["history"], state.get("init"))


def load_init(learner: Learner, training: Images, init: Path | str) -> dict[str, Any]:
    """Load the weights of a trained network or a module into the learner; return the record of their origin.

    For a trained network, the record has weights_sha256, epoch, recipe, provenance, and the network's own init; for a
    module, see `start_from_module`. Parameters of a defence (StoG's gates, DLIF's gains) that the origin lacks keep
    their initial values. Raises InputError if the weights do not fit the learner's network, or its images.
    """
    from safetensors.torch import load_file

    networks = [learner.model, *([] if learner.average is None else [learner.average])]
    if isinstance(init, str):
        return start_from_module(find_module(init), init, networks, training[:COMPARED])
    recipe, trained = learner.recipe, find_weights(init)
    training.require_kind(recipe.data.name, trained.shape, trained.labels)
    weights, state = load_file(trained.file), learner.model.state_dict()
    # of a network with more time steps, take the parameters of the first ones
    for name in per_step_names(learner.model) & weights.keys():
        weights[name] = weights[name][: len(state[name])]
    with torch.device("meta"):
        needed = build_model(recipe, training.shape, len(training.labels)).state_dict()
    misfits = [name for name in weights if name not in state or state[name].shape != weights[name].shape]
    misfits += [name for name in needed if name not in weights]
    if misfits:
        raise InputError(
            f"the weights in {init} are of {described(trained)} and do not fit this recipe (the first that "
            f"differs is {misfits[0]}); use the same sections model and neuron, and the same defences that change "
            "neurons"
        )
    for network in networks:
        network.load_state_dict(weights, strict=False)
    return {
        "weights_sha256": trained.sha256,
        "epoch": trained.epoch,
        "recipe": trained.recipe.model_dump(mode="json"),
        "provenance": trained.provenance,
        "init": trained.init,
    }


def described(trained: TrainedWeights) -> str:
    """Describe a trained network: its model, width and method."""
    model = trained.recipe.model
    return f"{model.name!r} of width {model.width:g} ({trained.recipe.method})"


def save(learner: Learner, checkpoint: Checkpoint, data: dict[str, Any], out: Path) -> None:
    """Save the checkpoints of the last epoch, and after them the state.

    In this order a run that is killed in between resumes before this epoch, and writes its checkpoints again.
    """
    weights = learner.judged.state_dict()
    T = checkpoint.recipe.encoding.T  # scores at another T are those of another network
    scores = [entry["score"] for entry in checkpoint.history if entry.get("T", T) == T]
    if checkpoint.metrics["score"] >= max(scores):
        save_checkpoint(out / "best", checkpoint.model_copy(update={"choice": "best"}), weights)
    save_checkpoint(out / "last", checkpoint, weights)
    state = {
        "model": learner.model.state_dict(),
        "average": None if learner.average is None else weights,
        "optimizer": learner.optimizer.state_dict(),
        "history": checkpoint.history,
        "init": checkpoint.init,
        "data": data,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(out / STATE, buffer.getvalue())
