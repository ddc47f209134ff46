"""A bundle's reference: how the torch network answered the evaluation images, clean and attacked, at export.

    reference.npz    64-bit blake2b of each image, torch's logits, its verdict on each image under each condition
    images.npz       the images themselves, so that a machine without the data set can validate the bundle

The manifest names the data set and holds the figures; reading the bundle checks that they agree with the file.
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
LOGITS, VERDICT, NESTED = "logits/", "verdict/", "nested/"
DIGESTS, DIGESTS_V1 = "blake2b_64", "digests"  # the array of the images' digests; its name in schema version 1
DAMAGED = (OSError, ValueError, KeyError, BadZipFile)  # what numpy raises for a file that is not as we wrote it


class Nested(BaseModel):
    """A condition of a smaller tier that differs from that of the same name in the reference's own tier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    settings: str
    correct: int


class Promise(BaseModel):
    """A reference's figures: how many of the first n test images of a data set it gets right, by condition.

    settings: how strong each attack was, by condition (`Condition.settings`). nested: conditions of smaller tiers, so
    that a bundle exported with one tier can be validated with those below it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    n: int
    tier: str
    correct: dict[str, int]
    settings: dict[str, str] = {}  # empty in bundles of earlier versions, whose attacks cannot be compared
    nested: tuple[Nested, ...] = ()


class Reference(NamedTuple):
    """The torch network's answers to the evaluation images.

    digests: uint64 [n], the images' 64-bit blake2b. logits: float32 [n, K] of each precision whose answers do not
    depend on the machine, fp32's being torch's own. verdicts: bool [n] by condition, each attack made on the torch
    network.

    settings: how strong each attack was, by condition. nested: verdicts bool [n] by name and settings of the conditions
    of smaller tiers that differ.
    """

    digests: NDArray[np.uint64]
    logits: Mapping[str, NDArray[np.float32]]
    verdicts: Mapping[str, NDArray[np.bool_]]
    settings: Mapping[str, str] = {}
    nested: Mapping[tuple[str, str], NDArray[np.bool_]] = {}

    def under(self, name: str, settings: str) -> NDArray[np.bool_] | None:
        """Return its verdicts [n] under the condition of that name and settings; None if there is no such condition."""
        if self.settings.get(name) == settings:
            return self.verdicts.get(name)
        return self.nested.get((name, settings))


def digests(images: Images) -> NDArray[np.uint64]:
    """Return the 64-bit blake2b of each image's pixels and class, which identifies it: uint64 [N].

    This detects mix-ups; use `images_sha256` where a list of images must be trusted.
    """
    hashes = [
        blake2b(pixels.tobytes() + int(k).to_bytes(8, "little"), digest_size=8).digest()
        for pixels, k in zip(np.ascontiguousarray(images.pixels), images.classes, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), "<u8")


def images_sha256(images: Images) -> str:
    """Return the sha256 of all pixels, uint8 [N, C, H, W], followed by all classes, little-endian int64 [N]."""
    content = sha256(np.ascontiguousarray(images.pixels).data)
    content.update(np.ascontiguousarray(images.classes, "<i8").data)
    return content.hexdigest()


def save_reference(reference: Reference, path: Path) -> None:
    logits = {LOGITS + name: array for name, array in reference.logits.items()}
    verdicts = {VERDICT + name: array for name, array in reference.verdicts.items()}
    nested = {f"{NESTED}{place}": correct for place, correct in enumerate(reference.nested.values())}
    everything = {DIGESTS: reference.digests, **logits, **verdicts, **nested}
    np.savez_compressed(path, **everything)  # type: ignore[arg-type]


def load_reference(path: Path, promise: Promise) -> Reference:
    """Read reference.npz. Raises InputError if it is damaged or the manifest promises other figures than it holds."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            arrays_read = {name: arrays[name] for name in arrays.files}
        logits = {name[len(LOGITS) :]: array for name, array in arrays_read.items() if name.startswith(LOGITS)}
        verdicts = {name[len(VERDICT) :]: array for name, array in arrays_read.items() if name.startswith(VERDICT)}
        nested = {(one.name, one.settings): arrays_read[f"{NESTED}{place}"] for place, one in enumerate(promise.nested)}
        reference = Reference(
            arrays_read[DIGESTS if DIGESTS in arrays_read else DIGESTS_V1], logits, verdicts, promise.settings, nested
        )
    except DAMAGED as error:
        raise InputError(f"{path} does not hold a reference ({error}); export again") from None
    counted = {name: int(verdict.sum()) for name, verdict in verdicts.items()}
    counts = counted == promise.correct and [int(correct.sum()) for correct in nested.values()] == [
        one.correct for one in promise.nested
    ]
    if not counts or {len(array) for array in arrays_read.values()} != {promise.n}:
        raise InputError(f"the manifest beside {path} states other figures than that file holds; export again")
    return reference


def save_images(images: Images, path: Path) -> None:
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
