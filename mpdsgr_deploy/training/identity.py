"""What identifies a training run: its recipe and its data; and the check that a single process starts it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import images_sha256

# Environment variables in which a launcher tells each process how many it started
LAUNCHERS = {
    "WORLD_SIZE": "torchrun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}

# Entries of a run's identity that are digests, and the images that they are of
DIGESTS = {
    "sha256 of the training images": "the training images",
    "sha256 of the validation images": "the validation images",
}


def refuse_launchers(environment: Mapping[str, str]) -> None:
    """Raise InputError if torchrun, srun or MPI started several of this process: each would train alone into `out`."""
    for variable, launcher in LAUNCHERS.items():
        count = environment.get(variable, "1")
        if count.isdigit() and int(count) > 1:
            raise InputError(
                f"{launcher} started {count} processes ({variable}={count}), but mpdsgr train starts its own, one per "
                f"device; run it once, with --set training.devices={count}"
            )


def refuse_changes(before: Recipe, now: Recipe, out: Path) -> None:
    """Raise InputError if a run would be resumed with a recipe that changes its training.

    `attack` and `validation` matter only after training, `recompute` changes no bit.
    """
    ignored: Any = {"attack": True, "validation": True, "training": {"recompute"}}
    old, new = (recipe.model_dump(exclude=ignored) for recipe in (before, now))
    changed = [
        f"{section}.{key}"
        for section in new
        for key in sorted({*old[section], *new[section]})
        if old[section].get(key) != new[section].get(key)
    ]
    if changed:
        raise InputError(f"{out} was trained with other values of {', '.join(changed)}; resume with the same recipe")


def data_identity(training: Images, validation: Images) -> dict[str, Any]:
    """What identifies the images of a run, in types that a state file can hold."""
    return {
        "labels": list(training.labels),
        "shape": list(training.shape),
        "training images": len(training),
        "validation images": len(validation),
        **{key: images_sha256(images) for key, images in zip(DIGESTS, (training, validation), strict=True)},
    }


def refuse_other_data(before: dict[str, Any] | None, now: dict[str, Any], out: Path) -> None:
    """Raise InputError, naming the first difference, if a run would be resumed on other images or classes.

    before: None for a run of a version that did not record its data.
    """
    different = [what for what in now if before is not None and before.get(what) != now[what]]
    if before is None or not different:
        return
    what = different[0]
    was: Any = before.get(what)
    value: Any = now[what]
    if what == "labels":
        gone, new = sorted(set(was) - set(value)), sorted(set(value) - set(was))
        changes = [f"{word} {', '.join(names[:5])}" for word, names in (("without", gone), ("with", new)) if names]
        detail = f"its classes are now {' and '.join(changes) or 'in another order'}"
    elif what in DIGESTS:
        detail = f"{DIGESTS[what]} are others, or in another order"
    else:
        detail = f"{what} before: {was}, now: {value}"
    raise InputError(f"{out} was trained on other data: {detail}; bring the data back or start anew in another --out")
