"""Refuse to resume a training run with another recipe or on other data."""

from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import images_sha256

# The digests in `data_identity`, and what messages call the images
DIGESTS = {
    "sha256 of the training images": "the training images",
    "sha256 of the validation images": "the validation images",
}


def refuse_changes(before: Recipe, now: Recipe, out: Path) -> None:
    """Raise InputError, naming the keys, if a run would be resumed with a recipe that trains other weights.

    The trained weights do not depend on `attack`, `validation`, `gate`, `training.recompute` and `training.pictures`.
    """
    ignored: Any = {"attack": True, "validation": True, "gate": True, "training": {"recompute", "pictures"}}
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
    """Return labels, shape, and number and sha256 of the training and the validation images, as JSON values."""
    return {
        "labels": list(training.labels),
        "shape": list(training.shape),
        "training images": len(training),
        "validation images": len(validation),
        **{key: images_sha256(images) for key, images in zip(DIGESTS, (training, validation), strict=True)},
    }


def refuse_other_nodes(fabric: Fabric, out: Path, epochs: int, data: dict[str, Any]) -> None:
    """Raise InputError if this process sees other finished epochs in `out` than process 0, or other images."""
    first: tuple[int, dict[str, Any]] = fabric.broadcast((epochs, data))
    if first[0] != epochs:
        raise InputError(
            f"process {fabric.global_rank} sees {epochs} finished epochs in {out}, and process 0 sees {first[0]}; "
            "choose a directory that all nodes share"
        )
    if first[1] != data:
        raise InputError(
            f"process {fabric.global_rank} has other images than process 0; copy the same data set to every node"
        )


def refuse_other_data(before: dict[str, Any] | None, now: dict[str, Any], out: Path) -> None:
    """Raise InputError, naming the first difference, if a run would be resumed on other images or classes.

    before: the recorded identity; None for a run of a version that did not record its data.
    """
    different = [key for key in now if before is not None and before.get(key) != now[key]]
    if before is None or not different:
        return
    key = different[0]
    was: Any = before.get(key)
    value: Any = now[key]
    if key == "labels":
        gone, new = sorted(set(was) - set(value)), sorted(set(value) - set(was))
        changes = [f"{word} {', '.join(names[:5])}" for word, names in (("without", gone), ("with", new)) if names]
        detail = f"its classes are now {' and '.join(changes) or 'in another order'}"
    elif key in DIGESTS:
        detail = f"{DIGESTS[key]} are different, or in another order"
    else:
        detail = f"{key} before: {was}, now: {value}"
    raise InputError(f"{out} was trained on other data: {detail}; restore the data, or start again in another --out")
