"""Choose the images for evaluating an artefact, and check that they are the promised ones."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.reference import IMAGES, Reference, digests, load_images

# 64-bit blake2b of the first 100 test images, with their classes, of data sets whose order is the same everywhere.
WELL_KNOWN = {"digits": "545781e6091becde", "cifar10": "cb86e883e52e0c7a", "cifar100": "11f8368e377b712e"}
FIRST = 100
MAX_REPEATED = 0.01  # share of class names that may be duplicates; ImageNet's usual list has 2 of 1,000


def evaluation_images(bundle: Bundle, data: str | None, root: str | None) -> Images:
    """Load the test images that the bundle carries; with `data` or `root`, or if it has none, the data set's own.

    Raises InputError for missing data, or if the network was not made for such images.
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
    """Return the first `limit` test images; None: the `usual` number, or as many as the reference answered.

    Raises InputError if there are fewer than `limit`.
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
    """Return the data set's own images to compare `images` with: themselves if `data` or `root` chose them.

    None if the data set is not on this machine; images and classes are then as the bundle claims. A folder of images is
    never recognised, because its name does not identify it.
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
    """Return how these images, the first of data set `name`, differ from those that were promised.

    own: the data set's own, if available; without them, images and classes are as the bundle claims.
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
    """Return how images and names of classes differ from those of the data set itself."""
    common = min(len(images), len(own))
    if different := int((digests(images[:common]) != digests(own[:common])).sum()):
        yield f"{different} of {common} images differ from those of the data set"
    if images.labels != own.labels:
        yield "the names or the order of the classes differ from the data set"


def blake2b_64(image_digests: NDArray[np.uint64]) -> str:
    """Return the 64-bit blake2b of a sequence of images, in hex, computed from those of the images."""
    return blake2b(image_digests.astype("<u8").tobytes(), digest_size=8).hexdigest()


Kind = tuple[tuple[int, int, int], tuple[str, ...]]  # shape of an image, class names


def require_alike(path: Path, theirs: Kind, expected: Kind) -> None:
    """Raise InputError unless another network, from `path`, was made for images of the same kind."""
    if theirs != expected:
        raise InputError(
            f"{path} takes other images than the network under attack; give another bundle or checkpoint to --transfer"
        )
