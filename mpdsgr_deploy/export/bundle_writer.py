"""The export stage: checkpoint directory in, bundle out, parity and accuracy measured on the way."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from mpdsgr_deploy.bundle import GOLDEN, WEIGHTS, Accuracy, Bundle, Variant, seal, staged
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint, load_model
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.export.fold import fold_tdbn
from mpdsgr_deploy.export.onnx_writer import INPUT, OUTPUT, write_onnx
from mpdsgr_deploy.parity import Parity, compare
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.runtime.torch_model import TorchModel

PARITY_BATCHES = (1, 2, 5, 33)
GOLDEN_ROWS = 8


def export(checkpoint_dir: Path, out: Path, *, root: str | None = None, limit: int | None = None) -> Bundle:
    """Write the fp32 bundle of a checkpoint (or of a training run: its best one) to directory `out`.

    root overrides where the data set lies, limit the number of test images accuracy is measured on (default: the
    recipe's). Without the data set the bundle is written all the same, with noise as golden inputs and no accuracy.
    Raises InputError for a damaged checkpoint or an `out` that is not ours, EvaluationError if the ONNX file and
    the torch model disagree.
    """
    source = find_checkpoint(checkpoint_dir)
    checkpoint = load_checkpoint(source)
    model = load_model(source / checkpoint.weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    images = _test_images(checkpoint.recipe.data, checkpoint.shape, root, limit or checkpoint.recipe.validation.limit)
    inputs = _probe(images, checkpoint.shape)
    with staged(out) as scratch:
        write_onnx(fold_tdbn(model), checkpoint.shape, scratch / "model.fp32.onnx")
        reference = TorchModel(model, checkpoint.shape)
        with OnnxRuntime(scratch / "model.fp32.onnx") as artefact:
            parity = _parity(reference, artefact, inputs)
            if not parity.holds:
                raise EvaluationError(f"the exported network differs from the torch model: {parity}; no bundle written")
            log.info("onnxruntime against torch: %s", parity)
            accuracy = _accuracy(artefact, images, checkpoint.recipe.data.name, checkpoint.recipe.validation.batch_size)
        golden = inputs[:GOLDEN_ROWS]
        np.savez(scratch / GOLDEN, inputs=golden, logits=reference(golden))
        shutil.copyfile(source / checkpoint.weights, scratch / WEIGHTS)
        return seal(
            scratch,
            out,
            input_name=INPUT,
            output_name=OUTPUT,
            input_shape=checkpoint.shape,
            labels=checkpoint.labels,
            recipe=checkpoint.recipe,
            variants={"fp32": Variant(file="model.fp32.onnx", accuracy=accuracy)},
            provenance={"export": provenance(), "training": checkpoint.provenance, "epoch": checkpoint.epoch},
        )


def _test_images(config: Data, shape: tuple[int, int, int], root: str | None, limit: int | None) -> Images | None:
    if root is not None:
        config = config.model_copy(update={"root": root})
    try:
        images = load_test(config)
    except InputError as error:
        log.warning("accuracy is not measured and noise serves as golden input: %s", error)
        return None
    if images.shape != shape:
        raise InputError(f"the network takes images of shape {shape}, those of {config.name} have {images.shape}")
    return images[: limit or len(images)]


def _probe(images: Images | None, shape: tuple[int, int, int]) -> np.ndarray:
    """Enough float32 images for the parity check: test images, or noise where there are none."""
    count = sum(PARITY_BATCHES)
    if images is not None:
        return images[: min(count, len(images))].unit()
    return np.random.default_rng(0).random((count, *shape), np.float32)


def _parity(reference: Predictor, artefact: Predictor, inputs: np.ndarray) -> Parity:
    """Compare on consecutive batches of several sizes, which also proves the batch dimension dynamic."""
    bounds = np.cumsum((0, *PARITY_BATCHES))
    batches = [inputs[a:b] for a, b in pairwise(bounds) if a < len(inputs)]
    return compare(
        np.concatenate([reference(batch) for batch in batches]), np.concatenate([artefact(batch) for batch in batches])
    )


def _accuracy(artefact: Predictor, images: Images | None, data: str, batch_size: int) -> Accuracy | None:
    if images is None:
        return None
    logits = predict(artefact, images.unit(), batch_size, "measuring accuracy")
    return Accuracy(data=data, correct=int((logits.argmax(1) == images.classes).sum()), n=len(images))
