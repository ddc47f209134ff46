"""Run conditions batch by batch: skip images that are misclassified anyway, and keep finished batches on disk."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.atomic_files import atomic_file, writing
from mpdsgr_deploy.attacks.condition import Attacked, Batch, Classes, Condition, Floats
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor

NOT_FINITE = -1  # the class of an image whose logits are not all finite
ANSWERS = "answers.npy"  # the logits of the clean images, stored beside the finished batches
VERDICTS = "verdicts.npz"  # replaces the batches once all conditions are finished


class Journal:
    """Finished batches in a directory, so that an interrupted evaluation continues where it stopped.

    identity: a text of everything that determines the result of a batch. Batches of another identity are not used.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory = directory / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def begin(self, logits: Floats) -> None:
        """Delete earlier batches unless the network's logits [n, K] equal those of that time, up to single spikes.

        `identity` alone does not show that a server has loaded another model or a library was updated. Raises
        InputError if the directory cannot be written.
        """
        with writing(self._directory, "what was finished is kept"):
            if not self._answered_alike(logits):
                shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._directory / ANSWERS) as file:
            np.save(file, logits)

    def _answered_alike(self, logits: Floats) -> bool:
        try:
            before = np.load(self._directory / ANSWERS, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return before.shape == logits.shape and compare(before, logits).holds

    def get(self, name: str, rows: slice, shape: tuple[int, ...]) -> "Part | None":
        """Return the batch `rows` that `put` stored; None if missing, damaged or not of `shape` [b, C, H, W]."""
        try:
            with np.load(self._file(name, rows.start), allow_pickle=False) as archive:
                images, predicted, counts = archive["images"], archive["predicted"], archive["counts"]
            if (images.shape, predicted.shape, counts.shape) != (shape, shape[:1], (len(Attacked._fields) - 1,)):
                return None
            return Part(rows, Attacked(images, *map(int, counts)), predicted)
        except (OSError, ValueError, KeyError, BadZipFile):
            return None

    def put(self, name: str, part: "Part") -> None:
        """Store a batch. Raises InputError if the disk is full or the directory cannot be written."""
        with writing(self._directory, "what was finished is kept"):
            self._directory.mkdir(parents=True, exist_ok=True)
        images, *counts = part.attacked
        with atomic_file(self._file(name, part.rows.start)) as file:
            np.savez(file, images=images, counts=np.array(counts, np.int64), predicted=part.predicted)

    def finish(self, verdicts: Mapping[str, NDArray[np.bool_]]) -> None:
        """Replace all batches by their verdicts [N] by condition.

        Raises InputError if the disk is full or the directory cannot be written.
        """
        with writing(self._directory, "what was finished is kept"), atomic_file(self._directory / VERDICTS) as file:
            np.savez(file, **verdicts)  # type: ignore[arg-type]  # numpy takes these names for its own options
        for batch in self._directory.glob("*-*.npz"):
            batch.unlink()

    def verdicts(self) -> dict[str, NDArray[np.bool_]] | None:
        """Return the verdicts that `finish` stored; None if missing or damaged."""
        try:
            with np.load(self._directory / VERDICTS, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, KeyError, BadZipFile):
            return None

    def _file(self, name: str, start: int) -> Path:
        return self._directory / f"{name.replace(' ', '-').replace(':', '-')}-{start}.npz"


class Part(NamedTuple):
    """One batch under one condition: attacked images [b, C, H, W] and the classes [b] predicted for them."""

    rows: slice
    attacked: Attacked
    predicted: Classes


def run(
    suite: Suite,
    condition: Condition,
    x: Floats,
    y: Classes,
    clean: Classes,
    *,
    batch_size: int,
    journal: Journal | None = None,
) -> Iterator[Part]:
    """Attack images x [N, C, H, W] with classes y [N] under a condition, and yield the batches.

    The suite's network classifies the attacked images. clean [N]: the classes that it predicts for x. Images that it
    misclassifies without attack count as broken and are not attacked; noise is added to all images.
    """
    with ExitStack() as stack:
        attack = None  # opened once there is an image to attack
        for start in range(0, len(x), batch_size):
            rows = slice(start, min(start + batch_size, len(x)))
            part = journal.get(condition.name, rows, x[rows].shape) if journal else None
            if part is None:
                batch = Batch(x[rows], y[rows], np.arange(rows.start, rows.stop))
                every, right = np.arange(len(batch.y)), np.flatnonzero(clean[rows] == batch.y)
                chosen = every if condition.kind == "noise" else right
                if attack is None and len(chosen):
                    attack = stack.enter_context(suite.open(condition))
                part = Part(rows, *_attacked_rows(attack, batch, chosen, clean[rows], suite.network))
                if journal:
                    journal.put(condition.name, part)
            yield part


def _attacked_rows(
    attack: Callable[[Batch], Attacked] | None, batch: Batch, chosen: Classes, before: Classes, network: Predictor
) -> tuple[Attacked, Classes]:
    """Return the batch with the rows `chosen` attacked, and the classes predicted for the whole batch.

    before: the predicted classes without attack. attack: None if no image was to be attacked so far.
    """
    images, predicted = batch.x.copy(), before.copy()
    if attack is None or not len(chosen):
        return Attacked(images), predicted
    attacked = attack(batch.rows(chosen))
    images[chosen] = attacked.images
    predicted[chosen] = classes_of(network(images[chosen]))
    return attacked._replace(images=images), predicted


def classes_of(logits: Floats) -> Classes:
    """Return the class of the largest logit of each row of logits [n, K]; NOT_FINITE if the row has NaN or infinity."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), NOT_FINITE)


def gather(parts: list[Part]) -> tuple[Attacked, Classes]:
    """Join parts into the attacked images with their summed costs, and the predicted classes [N]."""
    counts = np.sum([part.attacked[1:] for part in parts], axis=0)
    attacked = Attacked(np.concatenate([part.attacked.images for part in parts]), *map(int, counts))
    return attacked, np.concatenate([part.predicted for part in parts])
