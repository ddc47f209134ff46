"""Write the ONNX files of an adopted network into its bundle, and compute their logits."""

from pathlib import Path
from shutil import copyfile
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.adoption.classifier import ELEMENTWISE, Classifier, cut_off, probabilities
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import EvaluationError, InputError, one_line
from mpdsgr_deploy.parity import compare, in_batches
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.session import CPU, Session
from mpdsgr_deploy.validation.health.artefact import are_probabilities

ADVICE = "export it with a free batch dimension (dynamic_shapes), in eval mode, and without state between calls"
CHUNK = RuntimeSettings(chunk=32)  # limits the images that are computed at once, and thus the memory
BATCHES = (1, 2, 5)  # batch sizes in which the first images are computed, to compare them with one batch


class AdoptedVariant(NamedTuple):
    """A precision: the user's file, the classifier made from it, without its nodes, and the images' logits [N, K]."""

    file: Path
    classifier: Classifier
    logits: NDArray[np.float32]


def place_variant(file: Path, classifier: Classifier, target: Path, images: Images, recipe: Recipe) -> AdoptedVariant:
    """Write a network to `target` and compute its logits. Raises InputError if they depend on the batch."""
    if classifier.unchanged:
        copyfile(file, target)
    else:
        onnx.checker.check_model(classifier.network, full_check=True)
        onnx.save(classifier.network, target)
    x = images[: sum(BATCHES)].unit()
    with OnnxRuntime(target, source=file, settings=CHUNK) as network:
        try:
            together = network(x)
            apart = in_batches(network, x, BATCHES)
        except InputError as error:
            size = "" if classifier.batch is None else f" than {classifier.batch}"
            raise InputError(
                f"{file} does not run with another batch size{size} ({one_line(error)}); {ADVICE}"
            ) from None
        parity = compare(together, apart)
        if not parity.holds:
            raise InputError(f"{file} gives an image other logits in another batch ({parity}); {ADVICE}")
        _check_freed(file, classifier, x, together)
        logits = predict(network, images.unit(), recipe.validation.batch_size, f"{target.stem}, clean")
    if logits.shape != (len(images), classifier.classes) or not np.isfinite(logits).all():
        raise EvaluationError(f"{file} does not give {classifier.classes} finite logits for each image")
    if are_probabilities(logits):
        raise InputError(cut_off(file, classifier.network, probabilities(classifier.network, through=ELEMENTWISE)))
    return AdoptedVariant(file, classifier._replace(network=onnx.ModelProto()), logits)


def _check_freed(file: Path, classifier: Classifier, x: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
    """Raise InputError unless the network with a dynamic batch gives the logits of the file at its fixed batch."""
    if classifier.batch is None:
        return
    rows = np.arange(classifier.batch) % len(x)
    with Session(file, CPU, source=file) as own:
        (name,) = own.inputs
        (expected,) = own({name: classifier.before.applied(x[rows])}, own.outputs)
    parity = compare(expected, logits[rows])
    if not parity.holds:
        raise InputError(
            f"{file} has a fixed batch size of {classifier.batch}, and gives other logits when it is changed "
            f"({parity}); {ADVICE}"
        )


def same_kind(file: Path, other: Classifier, main: Classifier) -> Classifier:
    """Return `other`, the classifier of `file`. Raises InputError unless its images and classes are those of `main`."""
    if (other.shape, other.classes) != (main.shape, main.classes):
        raise InputError(
            f"{file} maps {other.shape} to {other.classes} logits, but the network maps {main.shape} to "
            f"{main.classes}; give the same network in another precision"
        )
    return other
