"""What the bundle says of its images: which they are, their classes, and what these are called."""

import numpy as np

from faults.planted import Planted, fault
from mpdsgr_deploy.attacks.condition import WORST, Network
from mpdsgr_deploy.attacks.promise import promise
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.reference import DIGESTS, IMAGES, LOGITS, REFERENCE, VERDICT, digests, save_images, save_reference
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork


def pick(copy: Planted, rows: np.ndarray) -> None:
    """These images in place of all, with what torch answered to them."""
    for file in (REFERENCE, IMAGES):
        found = copy.arrays(file)
        copy.write(file, {name: array if name == "labels" else array[rows] for name, array in found.items()})


def promise_for(copy: Planted, images: Images) -> None:
    """Other images, answered and attacked by the torch network as an export does."""
    model = TorchModel.from_bundle(open_bundle(copy.path))
    promise_by(copy, TorchNetwork(model), images)
    save_images(images, copy.path / IMAGES)


def promise_by(copy: Planted, network: Network, images: Images) -> None:
    """The promise that the images are answered and withstand attacks as they do with `network`."""
    figures, reference = promise(network, copy.recipe, images, "commit", network(images.unit()), of="a promise")
    copy.manifest["reference"] = figures.model_dump()
    save_reference(reference, copy.path / REFERENCE)


def carried(copy: Planted) -> Images:
    found = copy.arrays(IMAGES)
    return Images(found["pixels"], found["classes"], tuple(copy.manifest["labels"]))


@fault("promise", 3, "check 11")
def easy_images_only(copy: Planted) -> None:
    """The images that withstand every attack, several times over, with what torch answered to them."""
    easy = np.flatnonzero(copy.arrays(REFERENCE)[VERDICT + WORST])
    pick(copy, np.resize(easy, 100))


@fault("promise", 3, "check 11", thorough=True)
def images_of_training(copy: Planted) -> None:
    """Images that the network has learnt, promised and carried."""
    promise_for(copy, load_training(copy.recipe.data)[0][:100])


@fault("promise", 3, "check 11")
def images_in_another_order(copy: Planted) -> None:
    """A loader that shuffles: other images are the first n."""
    pick(copy, np.random.default_rng(0).permutation(100))


@fault("promise", 3, "check 11")
def images_are_not_those_promised(copy: Planted) -> None:
    """images.npz of another export."""
    images = copy.arrays(IMAGES)
    copy.write(IMAGES, images | {"pixels": images["pixels"][::-1]})


@fault("promise", 3, "check 11")
def classes_of_the_images_shuffled(copy: Planted) -> None:
    """A label file of another order, carried and promised: the promise is that nothing is recognised."""
    images = carried(copy)
    promise_for(copy, Images(images.pixels, np.roll(images.classes, 1), images.labels))


@fault("promise", 2, "does not fit the network")
def names_of_the_classes_shuffled(copy: Planted) -> None:
    """The right number of the class under the wrong name: what a user is told is wrong."""
    copy.manifest["labels"] = copy.manifest["labels"][::-1]


@fault("promise", 2, "cannot decide this gate")
def no_images_carried(copy: Planted) -> None:
    """An empty images.npz: nothing is compared, and nothing differs."""
    images = copy.arrays(IMAGES)
    copy.write(IMAGES, images | {name: images[name][:0] for name in ("pixels", "classes")})


@fault("promise", 2, "cannot decide this gate")
def too_few_images(copy: Planted) -> None:
    """A quick run on ten images, which no rule can be decided with."""
    copy.limit = 10


@fault("promise", 3, "check 15", kind="colour")
def images_of_three_classes_only(copy: Planted) -> None:
    """The first images of a list that is sorted by class, carried and promised."""
    copy.manifest["recipe"]["gate"] |= {"max_drop": 0.4}  # which so few can decide
    images = carried(copy)
    few = np.flatnonzero(images.classes < 3)
    promise_for(copy, Images(images.pixels[few], images.classes[few], images.labels))


@fault("promise", 3, "data set")
def classes_renamed_everywhere(copy: Planted) -> None:
    """Names of the classes in another order, in the manifest and beside the images."""
    reverse_names(copy)


@fault("promise", 3, "check 11")
def easy_images_from_the_101st_on(copy: Planted) -> None:
    """The first 100 images are those of the data set, whose digest is known; the others withstand every attack."""
    replace_all_but_the_first_100(copy)


@fault("promise", 3, "check 15", kind="colour")
def ten_equal_classes(copy: Planted) -> None:
    """A column of the wrong table: every image is said to be of the same class, in the images and in the promise."""
    images = carried(copy)
    same = Images(images.pixels, np.full_like(images.classes, images.classes[0]), images.labels)
    save_images(same, copy.path / IMAGES)
    copy.write(REFERENCE, copy.arrays(REFERENCE) | {DIGESTS: digests(same)})


@fault("promise", 3, "check 11", kind="colour")
def ten_equal_names(copy: Planted) -> None:
    """Names of the classes read from the wrong column: all are the same, in the manifest and beside the images."""
    copy.manifest["labels"] = ["digit"] * len(copy.manifest["labels"])
    copy.write(IMAGES, copy.arrays(IMAGES) | {"labels": np.array(copy.manifest["labels"])})


def replace_all_but_the_first_100(copy: Planted) -> None:
    """10 images that no attack broke, and of which the network is surest, follow the first 100 of the data set."""
    reference = copy.arrays(REFERENCE)
    best = np.sort(reference[LOGITS + "fp32"], axis=1)
    margins = np.where(reference[VERDICT + WORST], best[:, -1] - best[:, -2], -np.inf)
    pick(copy, np.concatenate([np.arange(100), np.resize(np.argsort(-margins)[:5], 10)]))


def reverse_names(copy: Planted) -> None:
    """Names of the classes in another order, in the manifest and beside the images."""
    copy.manifest["labels"] = copy.manifest["labels"][::-1]
    images = copy.arrays(IMAGES)
    copy.write(IMAGES, images | {"labels": images["labels"][::-1]})
