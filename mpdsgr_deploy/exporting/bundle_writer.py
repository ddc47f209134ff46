"""The export stage: write the bundle of a checkpoint directory, and measure its parity with torch and its accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from mpdsgr_deploy.attack_graph import derived
from mpdsgr_deploy.attacks.promise import promise
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import WEIGHTS, Bundle, Variant, model_file, seal, staged
from mpdsgr_deploy.checkpoint import Checkpoint, Choice, find_checkpoint, weights_bytes
from mpdsgr_deploy.data import Images, load_test, load_training
from mpdsgr_deploy.data.likeness import PixelStatistics
from mpdsgr_deploy.errors import EvaluationError, InputError, MissingData
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert, plan
from mpdsgr_deploy.exporting.precision_loss import Trial
from mpdsgr_deploy.exporting.step_search import fewest_steps
from mpdsgr_deploy.exporting.torch_parity import ComparedLogits, compared_logits, probe_images
from mpdsgr_deploy.golden import save_golden
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.models.time_steps import first_steps
from mpdsgr_deploy.onnx_files import INPUT, OUTPUT
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import IMAGES, REFERENCE, Promise, save_images, save_reference
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork, noise_inputs
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.trained_networks import load_network


def export(
    checkpoint_dir: Path,
    out: Path,
    *,
    recipe: Recipe | None = None,
    precisions: Sequence[str] = (),
    max_drop: float | None = None,
    root: str | None = None,
    limit: int | None = None,
    tier: str | None = None,
    carry_images: bool = True,
    choice: Choice | None = None,
    steps: int | Literal["auto"] | None = None,
) -> Bundle:
    """Write the bundle of a checkpoint to directory `out`.

    checkpoint_dir: a checkpoint, or a training run, whose last checkpoint (or `choice`) is exported.
    recipe: replaces the checkpoint's recipe for attacks, gate and test images.
    precisions: those to write in addition to fp32.
    max_drop: the largest loss of accuracy, as a share of the images, of each precision against fp32, on clean and on
        attacked images. Layers return to a finer precision until it holds. None sets no limit.
    root: the directory of the data set; None: that of the recipe. If the data set is missing there and `root` is None,
        golden inputs are noise, and the bundle states no accuracy and has no reference.
    limit: the number of test images that accuracy is measured on; None: that of the recipe.
    tier: how hard, and on how many of these images, the torch network is attacked for the reference that `validate`
        compares the artefact with; None: the tier of the recipe's gate.
    carry_images: store the attacked images in the bundle; without them, golden inputs are noise.
    steps: export the network of the first steps only, whose readout uses these alone; accuracies and the reference are
        then those of this network. "auto" chooses the fewest steps whose losses on clean and attacked validation images
        stay below max_drop (None: that of the tier); see `step_search.fewest_steps`.

    Raises InputError for a damaged checkpoint, an unknown precision or tier, an `out` that holds other files, max_drop
    without other precisions or without the data set, too few test images for `limit`, and a network that has no attack
    graph; EvaluationError if the ONNX file and the torch network disagree, if a precision gives logits that are not
    finite, and if max_drop cannot be met.
    """
    variants = _names(precisions, limited=max_drop is not None and steps != "auto")
    out = out.resolve()  # a link is followed, not replaced
    source = find_checkpoint(checkpoint_dir, choice)
    checkpoint, model = load_network(source)
    log.info("exporting the %s", checkpoint.origin)
    if recipe is not None:
        checkpoint = checkpoint.model_copy(update={"recipe": recipe})
    tier = tier or checkpoint.recipe.gate.tier
    attacked_count = choose("tier", TIERS, tier).images
    trained_steps = checkpoint.recipe.encoding.T
    with staged(out) as scratch:  # raises for a directory with other files before the export begins
        checkpoint, model, chosen_by = _with_steps(checkpoint, model, steps, max_drop, tier, root, limit)
        images = _test_images(checkpoint, root, limit)
        if images is None and max_drop is not None:
            raise InputError("--max-drop needs the test images of the data set; give its directory with --root")
        reference = TorchModel(model, checkpoint.shape, checkpoint.recipe.validation.seed)
        graph, compared = _float32(model, reference, images, scratch)
        written = _variants(variants, graph, reference, checkpoint.recipe, images, scratch, max_drop)
        if images is not None and not carry_images:  # images must not be stored as golden inputs either
            compared = compared_logits(reference, probe_images(None, checkpoint.shape), scratch / model_file("fp32"))
        _save_golden(reference, compared, written, scratch)
        figures = None
        if images is not None:
            attacked_images = images[:attacked_count]
            figures = _promise(reference, checkpoint.recipe, attacked_images, tier, written, scratch)
            if carry_images:
                save_images(attacked_images, scratch / IMAGES)
        (scratch / WEIGHTS).write_bytes(weights_bytes(model.state_dict()))
        return seal(
            scratch,
            out,
            input_name=INPUT,
            output_name=OUTPUT,
            input_shape=checkpoint.shape,
            noise=noise_inputs(model, checkpoint.shape),
            labels=checkpoint.labels,
            pixels=pixel_statistics(model),
            recipe=checkpoint.recipe,
            trained_steps=None if trained_steps == model.T else trained_steps,
            variants=written,
            reference=figures,
            provenance=_provenance(checkpoint, chosen_by),
        )


def _names(precisions: Sequence[str], *, limited: bool) -> list[str]:
    """Return the precisions to write. limited: whether only losses of those besides fp32 are limited.

    Raises InputError for an unknown precision, and if there is none whose losses could be limited.
    """
    names = list(dict.fromkeys(["fp32", *precisions]))
    for name in names:
        choose("precision", dict.fromkeys(PRECISIONS), name)
    if limited and len(names) == 1:
        raise InputError(
            "--max-drop limits the losses of other precisions and of fewer time steps; add --precision or --steps auto"
        )
    return names


def _with_steps(
    checkpoint: Checkpoint,
    model: SpikingNet,
    steps: int | Literal["auto"] | None,
    max_drop: float | None,
    tier: str,
    root: str | None,
    limit: int | None,
) -> tuple[Checkpoint, SpikingNet, dict[str, Any]]:
    """Return the checkpoint and network of the first `steps` (None: all), and how that number was chosen."""
    recipe, chosen_by = checkpoint.recipe, dict[str, Any]()
    if steps == "auto":
        _, images = load_training(recipe.data.at(root))
        images = images[: limit or TIERS[tier].images or len(images)]
        budget = TIERS[tier].max_drop if max_drop is None else max_drop
        steps, chosen_by = fewest_steps(model, recipe, checkpoint.shape, images, budget)
    if steps is None:
        return checkpoint, model, chosen_by
    model, recipe = first_steps(model, recipe, checkpoint.shape, steps)
    return checkpoint.model_copy(update={"recipe": recipe}), model, chosen_by


def _float32(
    model: SpikingNet, reference: TorchModel, images: Images | None, folder: Path
) -> tuple[ir.Model, ComparedLogits]:
    """Write the float32 variant; return its graph and the logits that were compared with those of torch.

    Raises EvaluationError if they differ.
    """
    graph = to_graph(simplify(model), reference.shape)
    file = folder / model_file("fp32")
    save(graph, file)
    compared = compared_logits(reference, probe_images(images, reference.shape), file)
    parity = compared.parity
    if not parity.holds:
        raise EvaluationError(
            f"the exported network differs from the torch network ({parity}), so no bundle was written; please "
            "report this as a bug"
        )
    log.info("onnxruntime compared with torch: %s", parity)
    return graph, compared


def _variants(
    names: Sequence[str],
    graph: ir.Model,
    reference: TorchModel,
    recipe: Recipe,
    images: Images | None,
    folder: Path,
    max_drop: float | None,
) -> dict[str, Variant]:
    """Write every precision and return its manifest entry, with accuracies if there are images.

    Raises InputError for one that has no attack graph, EvaluationError for one that loses more than max_drop.
    """
    if images is None:
        written = {name: _unmeasured_variant(graph, name, folder) for name in names}
    else:
        trial = Trial(graph, reference, recipe, images, folder, attacked=len(names) > 1)
        written = {name: trial.variant(name, max_drop) for name in names}
    for variant in written.values():
        derived(folder / variant.file, trained_surrogate(recipe))
    return written


def _save_golden(reference: TorchModel, compared: ComparedLogits, variants: dict[str, Variant], folder: Path) -> None:
    """Write inputs, the logits that torch gives for them, and those that each reduced precision gives on this machine.

    Raises EvaluationError for a precision whose logits are not finite.
    """
    inputs, logits = compared.inputs, {"fp32": compared.torch}
    for name, variant in variants.items():
        if name == "fp32":
            continue
        with OnnxRuntime(folder / variant.file, noise=reference.noise) as artefact:
            logits[name] = artefact(inputs)
        if not np.isfinite(logits[name]).all():
            raise EvaluationError(f"{name} overflows: some of its logits are not finite; leave this precision out")
    save_golden(folder, inputs, logits, compared.agreeing)


def pixel_statistics(model: SpikingNet) -> PixelStatistics | None:
    """Return the mean and standard deviation [C] of the training images, by which the network normalises its input.

    Returns None if the network does not normalise, for example if training started from another library's module.
    """
    mean, std = (values.flatten().tolist() for values in (model.normalize.mean, model.normalize.std))
    if not any(mean) and set(std) == {1.0}:
        return None
    return PixelStatistics(mean=tuple(mean), std=tuple(std))


def _promise(
    model: TorchModel, recipe: Recipe, images: Images, tier: str, variants: dict[str, Variant], folder: Path
) -> Promise:
    """Attack the torch network, write the reference to `folder` and return its accuracies.

    The reference holds torch's verdicts and logits, and the logits of precisions that are the same on every machine.
    """
    network = TorchNetwork(model)
    answers = predict(network, images.unit(), recipe.validation.batch_size, "clean")
    figures, reference = promise(network, recipe, images, tier, answers, of="torch")
    logits = dict(reference.logits)
    for name, variant in variants.items():
        if variant.exact and name != "fp32":
            with OnnxRuntime(folder / variant.file, noise=model.noise) as artefact:
                logits[name] = predict(artefact, images.unit(), recipe.validation.batch_size, f"{name}, reference")
    save_reference(reference._replace(logits=logits), folder / REFERENCE)
    return figures


def _provenance(checkpoint: Checkpoint, chosen_by: dict[str, Any]) -> dict[str, Any]:
    """Return where the network comes from. chosen_by: how the number of time steps was chosen, if it was."""
    return {
        "export": provenance(),
        "training": checkpoint.provenance,
        "epoch": checkpoint.epoch,
        "checkpoint": checkpoint.origin,
        **({"steps": chosen_by} if chosen_by else {}),
    }


def _test_images(checkpoint: Checkpoint, root: str | None, limit: int | None) -> Images | None:
    config = checkpoint.recipe.data.at(root)
    try:
        images = load_test(config)
    except MissingData as error:
        if root is not None:  # the caller asked for this data set
            raise
        log.warning("accuracy is not measured, and noise is used as golden input: %s", error)
        return None
    images.require_kind(config.name, checkpoint.shape, checkpoint.labels)
    if limit is not None and limit > len(images):
        raise InputError(f"{config.name} has {len(images)} test images, not {limit}; use fewer with --limit")
    return images[: limit or checkpoint.recipe.validation.limit or len(images)]


def _unmeasured_variant(graph: ir.Model, precision: str, folder: Path) -> Variant:
    """Write a variant and return its manifest entry without accuracies, because there are no images."""
    layers, file = plan(graph, precision), model_file(precision)
    save(convert(graph, layers), folder / file)
    return Variant(file=file, layers=layers)
