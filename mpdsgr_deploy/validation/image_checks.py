"""Choose the images on which an artefact is evaluated, and check that they are the promised ones."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.reference import IMAGES, Reference, digests, load_images

# 64-bit blake2b of the first 100 test images with their classes, for data sets whose order is the same everywhere
WELL_KNOWN = {"digits": "545781e6091becde", "cifar10": "cb86e883e52e0c7a", "cifar100": "11f8368e377b712e"}
FIRST = 100
MAX_REPEATED = 0.01  # share of class names that may repeat another; ImageNet's usual list repeats 2 of 1,000


def evaluation_images(bundle: Bundle, data: str | None, root: str | None) -> Images:
    """Load the test images that the bundle carries, or else those of the data set on this machine.

    data, root: name and directory of a data set, which is then used even if the bundle carries images. Raises
    InputError for missing data, and if the network was not made for such images.
    """
    manifest = bundle.manifest
    if data is None and root is None and IMAGES in manifest.files:
        images = load_images(bundle.file(IMAGES))
        name = manifest.recipe.data.name
    else:
        config = manifest.recipe.data.at(root)
        config = config if data is None else config.model_copy(update={"name": data})
        images, name = load_test(config), config.name
    images.require_kind(name, manifest.input_shape, manifest.labels)
    return images


def chosen_images(bundle: Bundle, limit: int | None, usual: int | None, data: str | None, root: str | None) -> Images:
    """Return the first test images: `limit` of them, or the `usual` number, or all if both are None.

    With `limit` None, the reference and the images at hand may limit the number further. data, root: see
    `evaluation_images`, which also describes the errors. Raises InputError if fewer than `limit` images are available.
    """
    manifest = bundle.manifest
    images = evaluation_images(bundle, data, root)
    carried = data is None and root is None and IMAGES in manifest.files
    counts = {"the bundle carries" if carried else "the data set has": len(images)}
    if manifest.reference is not None and data in (None, manifest.recipe.data.name):
        counts["the bundle's reference covers"] = manifest.reference.n
    for what, count in counts.items():
        if limit is not None and limit > count:
            more = "give the directory of the data set with --root" if carried else "use fewer with --limit"
            advice = more if count == len(images) else "export again with a larger --limit or --tier"
            raise InputError(f"{what} {count} test images, not {limit}; {advice}")
    return images[: min([*counts.values(), limit or usual or len(images)])]


def own_images(bundle: Bundle, images: Images, data: str | None, root: str | None) -> Images | None:
    """Return the data set's first images, to compare `images` with; `images` themselves if they come from there.

    None if the data set is not on this machine, so that images and classes rest on the bundle alone, and for a folder
    of images, whose name does not identify it.
    """
    if data is not None or root is not None or IMAGES not in bundle.manifest.files:
        return images
    config = bundle.manifest.recipe.data
    if config.name == "imagefolder":
        return None
    try:
        return load_test(config)[: len(images)]
    except InputError:
        return None


def image_faults(name: str, images: Images, reference: Reference | None, own: Images | None = None) -> list[str]:
    """Return the faults of images that should be the first ones of data set `name`, as phrases; empty for none.

    They are compared with the digests of the reference, with `own`, the data set's images if it is on this machine, and
    with a well-known digest if there is one.
    """
    image_digests, faults = digests(images), []
    if len(images) and images.classes.max(initial=0) >= len(images.labels):
        faults.append("some classes have no label")
    if (repeated := len(images.labels) - len(set(images.labels))) > MAX_REPEATED * len(images.labels):
        faults.append(f"{repeated} of {len(images.labels)} classes have the name of another")
    if reference is not None:
        common = min(len(image_digests), len(reference.digests))
        if different := int((image_digests[:common] != reference.digests[:common]).sum()):
            faults.append(f"{different} of {common} images differ from those of the reference")
    if own is not None:
        faults += _differences(images, own)
    if name in WELL_KNOWN and len(images) >= FIRST and blake2b_64(image_digests[:FIRST]) != WELL_KNOWN[name]:
        faults.append(f"the first {FIRST} images are not the first {FIRST} test images of {name}")
    return faults


def _differences(images: Images, own: Images) -> Iterator[str]:
    """Yield how images and names of classes differ from those of the data set itself."""
    common = min(len(images), len(own))
    if different := int((digests(images[:common]) != digests(own[:common])).sum()):
        yield f"{different} of {common} images differ from those of the data set"
    if images.labels != own.labels:
        yield "the names or the order of the classes differ from the data set"


def blake2b_64(image_digests: NDArray[np.uint64]) -> str:
    """Return the 64-bit blake2b, in hex, of the digests [N] of a sequence of images."""
    return blake2b(image_digests.astype("<u8").tobytes(), digest_size=8).hexdigest()


Kind = tuple[tuple[int, int, int], tuple[str, ...]]  # shape of an image, class names


def require_alike(path: Path, theirs: Kind, expected: Kind) -> None:
    """Raise InputError unless the other network, which was read from `path`, was made for the `expected` images."""
    if theirs != expected:
        raise InputError(
            f"{path} takes other images than the network under attack; give another bundle or checkpoint to --transfer"
        )
