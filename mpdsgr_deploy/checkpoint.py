"""Checkpoints: a directory with weights as safetensors, and a JSON file with everything else.

The JSON file names the file of weights and its hash. It is replaced after the weights are written, so a crash at any
time leaves the old or the new checkpoint complete.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.atomic_files import sha256, write_atomic
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import read_document

if TYPE_CHECKING:
    from torch import Tensor

FILE = "checkpoint.json"
Choice = Literal["last", "best"]
CHOICES: tuple[Choice, ...] = ("last", "best")  # the first is the default
NO_CURVE = {"epoch", "layers", "peak_mib", "score"}  # entries of the history that are not plotted over the epochs
VALIDATION_PGD = "validation_pgd"  # accuracy under attack after an epoch, if the recipe attacks validation images


class Checkpoint(BaseModel):
    """The content of checkpoint.json.

    shape: (C, H, W) of the images. epoch: counted from 1. choice: which epoch of its run this is, the last one or the
    one with the best score. score_of: what `metrics["score"]`, an accuracy in [0, 1], measures. Both are empty in
    checkpoints of schema version 1. history: the entry of each epoch, see `training.training_run`. init: the origin of
    the first weights, see `training.training_state.load_init`; None for random ones. weights: the name of the file
    beside the JSON file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 2
    recipe: Recipe
    shape: tuple[int, int, int]
    labels: tuple[str, ...]
    epoch: int
    choice: Choice | Literal[""] = ""
    score_of: str = ""
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    provenance: dict[str, Any]
    init: dict[str, Any] | None = None
    weights: str = ""
    weights_sha256: str = ""

    @property
    def curve(self) -> dict[str, list[Any]]:
        """The values that training logged, by name: a list of one value per epoch, None for epochs that lack it."""
        names = dict.fromkeys(name for entry in self.history for name in entry if name not in NO_CURVE)
        return {name: [entry.get(name) for entry in self.history] for name in names}

    @property
    def origin(self) -> str:
        """A phrase that says which epoch of its run this is, and why it was chosen."""
        epoch = f"epoch {self.epoch} of {self.recipe.training.epochs}"
        if self.choice == "best":
            return f"best checkpoint ({epoch}; highest {self.score_of}: {self.metrics['score']:.1%})"
        return f"last checkpoint ({epoch})" if self.choice else f"checkpoint of {epoch}"


def save_checkpoint(directory: Path, checkpoint: Checkpoint, weights: "dict[str, Tensor]") -> None:
    """Write a checkpoint into a directory, replacing an older one atomically.

    The fields `weights` and `weights_sha256` of `checkpoint` are filled in. Raises InputError if a file cannot be
    written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = weights_bytes(weights)
    digest = hashlib.sha256(data).hexdigest()
    name = f"weights-{digest[:12]}.safetensors"
    write_atomic(directory / name, data)
    complete = checkpoint.model_copy(update={"weights": name, "weights_sha256": digest})
    write_atomic(directory / FILE, complete.model_dump_json(indent=1).encode())
    for old in directory.glob("weights-*.safetensors"):
        if old.name != name:
            old.unlink()


def weights_bytes(weights: "dict[str, Tensor]") -> bytes:
    """Return tensors by name as the bytes of a safetensors file; equal tensors give equal bytes."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})


def find_checkpoint(directory: Path, choice: Choice | None = None) -> Path:
    """Return the directory of a checkpoint: `directory` itself, or of a training run the one of `choice`.

    The default is the last one. Raises InputError if there is none, and if `directory` is itself a checkpoint under
    another name than `choice`.
    """
    if (directory / FILE).is_file():
        if choice is not None and directory.name != choice:
            raise InputError(f"{directory} is itself a checkpoint; give its training run to choose the {choice} one")
        return directory
    chosen = directory / (choice or CHOICES[0])
    if not (chosen / FILE).is_file():
        raise InputError(f"no {FILE} in {directory} or {chosen}; give the directory that `mpdsgr train` wrote")
    return chosen


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify the checkpoint in `directory`. Raises InputError if it is missing, damaged or too new."""
    path = directory / FILE
    advice = "take another checkpoint or train again"
    checkpoint = read_document(path, Checkpoint, otherwise=advice)
    weights = directory / checkpoint.weights
    if Path(checkpoint.weights).name != checkpoint.weights or not weights.is_file():
        raise InputError(f"{path} names the weights {checkpoint.weights!r}, which are not in its directory")
    if sha256(weights) != checkpoint.weights_sha256:
        raise InputError(f"{weights} is damaged: its content does not match the hash in {FILE}")
    return checkpoint
