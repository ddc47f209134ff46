"""The export stage: checkpoint directory in, bundle out, parity and accuracy measured on the way."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from mpdsgr_deploy.bundle import GOLDEN, WEIGHTS, Accuracy, Bundle, Variant, seal, staged
from mpdsgr_deploy.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_model
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.export.onnx_writer import INPUT, OUTPUT, save, to_graph
from mpdsgr_deploy.export.simplify import simplify
from mpdsgr_deploy.parity import TOLERANCE, compare
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, noise_inputs

PARITY_BATCHES = (1, 2, 5, 33)
GOLDEN_ROWS = 8


def export(checkpoint_dir: Path, out: Path, *, root: str | None = None, limit: int | None = None) -> Bundle:
    """Write the fp32 bundle of a checkpoint (or of a training run: its best one) to directory `out`.

    root overrides where the data set lies, limit the number of test images accuracy is measured on (default: the
    recipe's). Without the data set the bundle is written all the same, with noise as golden inputs and no accuracy.
    Raises InputError for a damaged checkpoint or an `out` that is not ours, EvaluationError if the ONNX file and
    the torch model disagree.
    """
    out = out.resolve()  # a link is followed, not replaced
    source = find_checkpoint(checkpoint_dir)
    checkpoint = load_checkpoint(source)
    model = load_model(source / checkpoint.weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    images = _test_images(checkpoint, root, limit)
    inputs = _probe(images, checkpoint.shape)
    with staged(out) as scratch:
        save(to_graph(simplify(model), checkpoint.shape), scratch / "model.fp32.onnx")
        reference = TorchModel(model, checkpoint.shape, checkpoint.recipe.validation.seed)
        with OnnxRuntime(scratch / "model.fp32.onnx", noise=reference.noise) as artefact:
            expected, found = (_in_batches(network, inputs) for network in (reference, artefact))
            parity = compare(expected, found)
            if not parity.holds:
                raise EvaluationError(f"the exported network differs from the torch model: {parity}; no bundle written")
            log.info("onnxruntime against torch: %s", parity)
            accuracy = _accuracy(artefact, images, checkpoint.recipe.data.name, checkpoint.recipe.validation.batch_size)
        # rows on which no potential sits within rounding of the threshold: those that agree here
        golden = np.flatnonzero(np.abs(expected - found).max(1) <= TOLERANCE)[:GOLDEN_ROWS]
        np.savez(scratch / GOLDEN, inputs=inputs[golden], logits=expected[golden])
        shutil.copyfile(source / checkpoint.weights, scratch / WEIGHTS)
        return seal(
            scratch,
            out,
            input_name=INPUT,
            output_name=OUTPUT,
            input_shape=checkpoint.shape,
            noise=noise_inputs(model, checkpoint.shape),
            labels=checkpoint.labels,
            recipe=checkpoint.recipe,
            variants={"fp32": Variant(file="model.fp32.onnx", accuracy=accuracy)},
            provenance={"export": provenance(), "training": checkpoint.provenance, "epoch": checkpoint.epoch},
        )


def _test_images(checkpoint: Checkpoint, root: str | None, limit: int | None) -> Images | None:
    config = checkpoint.recipe.data
    if root is not None:
        config = config.model_copy(update={"root": root})
    try:
        images = load_test(config)
    except InputError as error:
        log.warning("accuracy is not measured and noise serves as golden input: %s", error)
        return None
    images.require_kind(config.name, checkpoint.shape, checkpoint.labels)
    return images[: limit or checkpoint.recipe.validation.limit or len(images)]


def _probe(images: Images | None, shape: tuple[int, int, int]) -> np.ndarray:
    """Enough float32 images for the parity check: test images, or noise where there are none."""
    count = sum(PARITY_BATCHES)
    if images is not None:
        return images[:count].unit()
    return np.random.default_rng(0).random((count, *shape), np.float32)


def _in_batches(network: Predictor, inputs: np.ndarray) -> np.ndarray:
    """Logits from consecutive batches of several sizes, which also proves the batch dimension dynamic."""
    bounds = np.cumsum((0, *PARITY_BATCHES))
    return np.concatenate([network(inputs[a:b]) for a, b in pairwise(bounds) if a < len(inputs)])


def _accuracy(artefact: Predictor, images: Images | None, data: str, batch_size: int) -> Accuracy | None:
    if images is None:
        return None
    logits = predict(artefact, images.unit(), batch_size, "measuring accuracy")
    return Accuracy(data=data, correct=int((logits.argmax(1) == images.classes).sum()), n=len(images))
