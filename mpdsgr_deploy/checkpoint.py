"""Checkpoints: what training hands to export. safetensors weights, and a JSON file with everything else.

The JSON names its weights file and that file's hash, and is written last: replacing it is the moment the new
checkpoint exists, so a crash at any time leaves the previous one whole.
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

SCHEMA_VERSION = 2
FILE = "checkpoint.json"
Choice = Literal["last", "best"]
CHOICES: tuple[Choice, ...] = ("last", "best")  # the first is the default
NO_CURVE = {"epoch", "layers", "peak_mib", "score"}  # entries of the history that are not plotted over the epochs
VALIDATION_PGD = "validation_pgd"  # accuracy under attack after an epoch, if the recipe attacks validation images


class Checkpoint(BaseModel):
    """`shape` is (C, H, W) of the input; `history` has one entry per epoch; `weights` is the file beside the JSON.

    choice: which epoch of its run this is: the last one, or the one with the best `metrics["score"]`; score_of says
    what that score measures. Both are empty in checkpoints of schema version 1. init: the checkpoint or
    module whose weights training started from (`training.training_state.load_init`); None: from random ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
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
        """The values that training logged, by name: one per epoch, None for epochs without it."""
        names = dict.fromkeys(name for entry in self.history for name in entry if name not in NO_CURVE)
        return {name: [entry.get(name) for entry in self.history] for name in names}

    @property
    def origin(self) -> str:
        """A phrase for people that says which epoch of its run this is, and why it was chosen."""
        epoch = f"epoch {self.epoch} of {self.recipe.training.epochs}"
        if self.choice == "best":
            return f"best checkpoint ({epoch}; highest {self.score_of}: {self.metrics['score']:.1%})"
        return f"last checkpoint ({epoch})" if self.choice else f"checkpoint of {epoch}"


def save_checkpoint(directory: Path, checkpoint: Checkpoint, weights: "dict[str, Tensor]") -> None:
    """Write a checkpoint directory, replacing an older one atomically. Raises InputError if the disk is full."""
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
    """Return the checkpoint directory: `directory` itself, or a training run's `choice` below it, by default the last.

    Raises InputError if there is none, or if `directory` is itself a checkpoint but not that of `choice`.
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
    """Read and verify the checkpoint in `directory`. Raises InputError if anything is missing, damaged or newer."""
    path = directory / FILE
    advice = "take another checkpoint or train again"
    checkpoint = read_document(path, Checkpoint, SCHEMA_VERSION, otherwise=advice)
    weights = directory / checkpoint.weights
    if Path(checkpoint.weights).name != checkpoint.weights or not weights.is_file():
        raise InputError(f"{path} names the weights {checkpoint.weights!r}, which are not in its directory")
    if sha256(weights) != checkpoint.weights_sha256:
        raise InputError(f"{weights} is damaged: its content does not match the hash in {FILE}")
    return checkpoint
