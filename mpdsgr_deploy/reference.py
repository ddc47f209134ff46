"""What a bundle promises: how the torch network answered the evaluation images, clean and attacked, when exported.

    reference.npz    64-bit blake2b of each image, torch's logits, its verdict on each image under each condition
    images.npz       the images themselves, so that a machine without the data set can validate the bundle

The manifest names the data set and holds the figures; who reads the bundle checks that they are those of the file.
"""

from collections.abc import Mapping
from hashlib import blake2b, sha256
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.errors import InputError

REFERENCE, IMAGES = "reference.npz", "images.npz"
LOGITS, VERDICT = "logits/", "verdict/"
DIGESTS, DIGESTS_V1 = "blake2b_64", "digests"  # the array of the images' digests; its name in schema version 1
DAMAGED = (OSError, ValueError, KeyError, BadZipFile)  # what numpy raises for a file that is not as we wrote it


class Promise(BaseModel):
    """A reference's figures: how many of the first n test images of a data set it gets right, by condition."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    n: int
    tier: str
    correct: dict[str, int]


class Reference(NamedTuple):
    """What the torch network answered.

    digests: uint64 [n], the images' 64-bit blake2b. logits: float32 [n, K] of each precision whose answers do not
    depend on the machine, fp32's being torch's own. verdicts: bool [n] by condition, each attack made on the torch
    network.
    """

    digests: NDArray[np.uint64]
    logits: Mapping[str, NDArray[np.float32]]
    verdicts: Mapping[str, NDArray[np.bool_]]


def digests(images: Images) -> NDArray[np.uint64]:
    """The 64-bit blake2b of each image's pixels and class, by which it is known again: uint64 [N].

    Enough against mix-ups; `images_sha256` is for those who must trust a list of images.
    """
    found = [
        blake2b(pixels.tobytes() + int(k).to_bytes(8, "little"), digest_size=8).digest()
        for pixels, k in zip(np.ascontiguousarray(images.pixels), images.classes, strict=True)
    ]
    return np.frombuffer(b"".join(found), "<u8")


def images_sha256(images: Images) -> str:
    """sha256 of all pixels, uint8 [N, C, H, W], followed by all classes, little-endian int64 [N]."""
    content = sha256(np.ascontiguousarray(images.pixels).data)
    content.update(np.ascontiguousarray(images.classes, "<i8").data)
    return content.hexdigest()


def save_reference(reference: Reference, path: Path) -> None:
    """Write reference.npz."""
    logits = {LOGITS + name: found for name, found in reference.logits.items()}
    verdicts = {VERDICT + name: found for name, found in reference.verdicts.items()}
    np.savez_compressed(path, **{DIGESTS: reference.digests}, **logits, **verdicts)  # type: ignore[arg-type]


def load_reference(path: Path, promise: Promise) -> Reference:
    """Read reference.npz. Raises InputError if it is damaged or the manifest promises other figures than it holds."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        logits = {name[len(LOGITS) :]: array for name, array in found.items() if name.startswith(LOGITS)}
        verdicts = {name[len(VERDICT) :]: array for name, array in found.items() if name.startswith(VERDICT)}
        reference = Reference(found[DIGESTS if DIGESTS in found else DIGESTS_V1], logits, verdicts)
    except DAMAGED as error:
        raise InputError(f"{path} does not hold a reference ({error}); export again") from None
    counted = {name: int(verdict.sum()) for name, verdict in verdicts.items()}
    if counted != promise.correct or {len(array) for array in found.values()} != {promise.n}:
        raise InputError(f"the manifest beside {path} promises other figures than that file holds; export again")
    return reference


def save_images(images: Images, path: Path) -> None:
    """Write images.npz."""
    np.savez_compressed(path, pixels=images.pixels, classes=images.classes, labels=np.array(images.labels))


def load_images(path: Path) -> Images:
    """Read images.npz. Raises InputError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, classes, labels = arrays["pixels"], arrays["classes"], arrays["labels"]
    except DAMAGED as error:
        raise InputError(f"{path} does not hold images ({error}); export again") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or classes.shape != pixels.shape[:1]:
        raise InputError(f"{path} does not hold uint8 images [N, C, H, W] and their classes; export again")
    return Images(pixels, classes.astype(np.int64), tuple(map(str, labels)))
