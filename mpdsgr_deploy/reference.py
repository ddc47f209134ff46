"""A bundle's reference: the torch network's logits and verdicts on the evaluation images, clean and attacked.

    reference.npz    64-bit blake2b of each image, logits, and the verdict on each image under each condition
    images.npz       the images, so that a machine without the data set can validate the bundle

The manifest names the data set and has the accuracies, which are checked against the file when it is read.
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
DIGESTS, DIGESTS_V1 = "blake2b_64", "digests"  # name of the array of the images' digests, now and in schema version 1
DAMAGED = (OSError, ValueError, KeyError, BadZipFile)  # what numpy raises for a file that is not complete and unchanged


class Nested(BaseModel):
    """A condition of a smaller tier, whose settings differ from that of the same name in the reference's tier.

    correct: how many images the torch network gets right under it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    settings: str
    correct: int


class Promise(BaseModel):
    """The reference as the manifest states it: how many of the first n test images of `data` are right, by condition.

    tier: the tier of the attacks. settings: the strength of each attack, by condition (`Condition.settings`). nested:
    conditions of smaller tiers, with which a bundle of this tier can also be validated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    n: int
    tier: str
    correct: dict[str, int]
    settings: dict[str, str] = {}  # empty in bundles of earlier versions, whose attacks cannot be compared
    nested: tuple[Nested, ...] = ()


class Reference(NamedTuple):
    """The torch network's logits and verdicts on the n evaluation images.

    digests: uint64 [n], the 64-bit blake2b of the images. logits: float32 [n, K] by precision, those of torch for fp32,
    without precisions whose rounding depends on the machine. verdicts: bool [n] by condition; all attacks were made on
    the torch network. settings: the strength of each attack, by condition. nested: verdicts bool [n] by name and
    settings, for conditions of smaller tiers that differ.
    """

    digests: NDArray[np.uint64]
    logits: Mapping[str, NDArray[np.float32]]
    verdicts: Mapping[str, NDArray[np.bool_]]
    settings: Mapping[str, str] = {}
    nested: Mapping[tuple[str, str], NDArray[np.bool_]] = {}

    def under(self, name: str, settings: str) -> NDArray[np.bool_] | None:
        """Return the verdicts [n] under the condition of that name and settings; None if there are none."""
        if self.settings.get(name) == settings:
            return self.verdicts.get(name)
        return self.nested.get((name, settings))


def digests(images: Images) -> NDArray[np.uint64]:
    """Return the 64-bit blake2b of the pixels and the class of each image: uint64 [N].

    This detects mix-ups. Use `images_sha256` where somebody might forge images.
    """
    hashes = [
        blake2b(pixels.tobytes() + int(k).to_bytes(8, "little"), digest_size=8).digest()
        for pixels, k in zip(np.ascontiguousarray(images.pixels), images.classes, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), "<u8")


def images_sha256(images: Images) -> str:
    """Return the sha256, in hex, of all pixels, uint8 [N, C, H, W], and all classes, little-endian int64 [N]."""
    content = sha256(np.ascontiguousarray(images.pixels).data)
    content.update(np.ascontiguousarray(images.classes, "<i8").data)
    return content.hexdigest()


def save_reference(reference: Reference, path: Path) -> None:
    """Write reference.npz; the manifest has to store the settings, which are not in the file."""
    logits = {LOGITS + name: array for name, array in reference.logits.items()}
    verdicts = {VERDICT + name: array for name, array in reference.verdicts.items()}
    nested = {f"{NESTED}{place}": correct for place, correct in enumerate(reference.nested.values())}
    everything = {DIGESTS: reference.digests, **logits, **verdicts, **nested}
    np.savez_compressed(path, **everything)  # type: ignore[arg-type]


def load_reference(path: Path, promise: Promise) -> Reference:
    """Read reference.npz. Raises InputError if it is damaged, or if `promise`, from the manifest, does not fit it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        logits = {name[len(LOGITS) :]: array for name, array in arrays.items() if name.startswith(LOGITS)}
        verdicts = {name[len(VERDICT) :]: array for name, array in arrays.items() if name.startswith(VERDICT)}
        nested = {(one.name, one.settings): arrays[f"{NESTED}{place}"] for place, one in enumerate(promise.nested)}
        image_digests = arrays[DIGESTS if DIGESTS in arrays else DIGESTS_V1]
        reference = Reference(image_digests, logits, verdicts, promise.settings, nested)
    except DAMAGED as error:
        raise InputError(f"{path} does not hold a reference ({error}); export again") from None
    correct = {name: int(verdict.sum()) for name, verdict in verdicts.items()}
    nested_correct = [int(verdict.sum()) for verdict in nested.values()]
    same = (correct, nested_correct) == (promise.correct, [one.correct for one in promise.nested])
    if not same or {len(array) for array in arrays.values()} != {promise.n}:
        raise InputError(f"the manifest beside {path} states other figures than that file holds; export again")
    return reference


def save_images(images: Images, path: Path) -> None:
    """Write images.npz, which `load_images` reads."""
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
