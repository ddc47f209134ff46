"""What the bundle says of itself: figures, images, labels, files."""

import json

import numpy as np

from faults.artefact import noisy
from faults.planted import Planted, fault
from mpdsgr_deploy.attacks.condition import CLEAN, GAUSSIAN, WORST
from mpdsgr_deploy.attacks.promise import promise
from mpdsgr_deploy.bundle import MANIFEST, open_bundle
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.reference import IMAGES, REFERENCE, save_images, save_reference
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork

VERDICT = "verdict/"


def pick(copy: Planted, rows: np.ndarray) -> None:
    """These images in place of all, with what torch answered to them."""
    for file in (REFERENCE, IMAGES):
        found = copy.arrays(file)
        copy.write(file, {name: array if name == "labels" else array[rows] for name, array in found.items()})


def promise_for(copy: Planted, images: Images) -> None:
    """Other images, answered and attacked by the torch network as an export does."""
    model = TorchModel.from_bundle(open_bundle(copy.path))
    network = TorchNetwork(model)
    figures, reference = promise(network, copy.recipe, images, "commit", network(images.unit()), of="torch")
    copy.manifest["reference"] = figures.model_dump()
    save_reference(reference, copy.path / REFERENCE)
    save_images(images, copy.path / IMAGES)


def carried(copy: Planted) -> Images:
    found = copy.arrays(IMAGES)
    return Images(found["pixels"], found["classes"], tuple(copy.manifest["labels"]))


@fault("promise", 2, "other figures")
def figures_of_the_manifest_edited(copy: Planted) -> None:
    """A hand that makes the table look better."""
    copy.manifest["reference"]["correct"][WORST] += 20


@fault("promise", 3, "check 13", thorough=True)
def figures_and_verdicts_edited(copy: Planted) -> None:
    """A promise that is easy to keep: the verdicts under attack edited along with their counts."""
    kept = {VERDICT + CLEAN, VERDICT + GAUSSIAN}
    found = copy.arrays(REFERENCE)
    for name in found.keys() - kept:
        if name.startswith(VERDICT):
            found[name] = found[name] & False
    copy.write(REFERENCE, found)


@fault("promise", 1, "does not answer as the exported network did")
def figures_of_another_training(copy: Planted) -> None:
    """The reference left over from the export before."""
    copy.take(REFERENCE)
    copy.write(REFERENCE, copy.arrays(REFERENCE))


@fault("promise", 2, "nothing to decide")
def no_promise_at_all(copy: Planted) -> None:
    """A network that nobody measured, here with noisy weights: there is nothing to compare it with."""
    copy.change("body.2.synapse.weight", noisy)
    copy.manifest["reference"] = None


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


@fault("promise", 2, "not what the network was made for")
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


@fault("promise", 2, "has no precision")
def unknown_precision(copy: Planted) -> None:
    """A job that asks for what was not exported."""
    copy.precision = "int4"


@fault("promise", 2, "is missing")
def file_missing(copy: Planted) -> None:
    """A copy that was interrupted."""
    copy.seal()
    (copy.path / "model.fp32.onnx").unlink()


@fault("promise", 2, "does not match its hash")
def file_changed_after_its_hash(copy: Planted) -> None:
    """A byte lost on the way."""
    copy.seal()
    with (copy.path / "attack.fp32.onnx").open("ab") as file:
        file.write(b"\0")


@fault("promise", 2, "its own digest")
def manifest_changed_after_its_digest(copy: Planted) -> None:
    """A manifest edited by hand: a recipe with a smaller eps."""
    copy.seal()
    manifest = json.loads((copy.path / MANIFEST).read_text())
    manifest["recipe"]["attack"]["eps"] = 0.01
    (copy.path / MANIFEST).write_text(json.dumps(manifest))


@fault("promise", 3, "check 13")
def verdicts_under_strong_attacks_deleted(copy: Planted) -> None:
    """A reference in which only weak attacks are left, so that nothing strong is compared."""
    weak = {VERDICT + name for name in (CLEAN, GAUSSIAN, "uniform", "fgsm", WORST)}
    found = copy.arrays(REFERENCE)
    copy.write(REFERENCE, {name: a for name, a in found.items() if name in weak or not name.startswith(VERDICT)})


@fault("promise", 3, "check 13")
def settings_of_the_promise_edited(copy: Planted) -> None:
    """A promise that claims to have met other attacks than the gate makes."""
    copy.manifest["reference"]["settings"] = dict.fromkeys(copy.manifest["reference"]["settings"], "a longer one")


@fault("promise", 3, "check 13", thorough=True)
def settings_of_the_promise_missing(copy: Planted) -> None:
    """A bundle of an earlier version: nobody knows how strong its attacks were."""
    copy.manifest["reference"]["settings"] = {}


@fault("promise", 3, "check 13")
def surrogate_of_the_recipe_edited(copy: Planted) -> None:
    """An attack through a surrogate that was not trained with, in a manifest that is whole."""
    copy.manifest["recipe"]["neuron"] |= {"surrogate": "triangle", "surrogate_parameter": 4.0}


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
    copy.manifest["labels"] = copy.manifest["labels"][::-1]
    images = copy.arrays(IMAGES)
    copy.write(IMAGES, images | {"labels": images["labels"][::-1]})


@fault("promise", 3, "check 13")
def eps_of_the_recipe_lowered(copy: Planted) -> None:
    """A smaller eps than the promise was measured with, in a manifest that is whole: easy to keep."""
    copy.manifest["recipe"]["attack"] |= {"eps": 0.01, "step": 0.01}
