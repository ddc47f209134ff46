"""Write a bundle around an ONNX file that was not exported by this package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.adoption.classifier import Classifier, Preprocessing, read_classifier
from mpdsgr_deploy.adoption.evaluation_images import relabelled
from mpdsgr_deploy.adoption.survey import Survey, survey
from mpdsgr_deploy.adoption.variant_files import CHUNK, AdoptedVariant, place_variant, same_kind
from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.attack_graph import attack_graph
from mpdsgr_deploy.attack_graph.attacker import NetworkFile
from mpdsgr_deploy.attacks.conditions import AttachedPGD, DetachedPGD
from mpdsgr_deploy.attacks.promise import promise
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import Accuracy, Bundle, Variant, model_file, seal, staged
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.golden import save_golden
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.parity import TOLERANCE, compare
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import IMAGES, REFERENCE, save_images, save_reference
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.surrogates import ATTACK_ONLY, KINDS, SurrogateName, parse_surrogate
from mpdsgr_deploy.validation.health.artefact import check_logits

# the attack with the other kind of resets, by whether the named surrogate detaches them
OTHER_RESETS = {False: DetachedPGD.method, True: AttachedPGD.method}
Origin = Literal["adopted", "module"]


def adopt(
    model: Path,
    images: Images,
    out: Path,
    *,
    surrogate: str = "triangle",
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] = (),
    variants: Mapping[str, Path] = MappingProxyType({}),
    reference: NDArray[np.float32] | None = None,
    recipe: Recipe | None = None,
    tier: str | None = None,
    carry_images: bool = True,
    origin: Origin = "adopted",
) -> Bundle:
    """Write a bundle whose network is the ONNX file `model`, byte for byte if it takes images in [0, 1].

    images: the labelled test images on which the reference is measured; labels: names of their classes, if they have
    others. surrogate: "KIND" or "KIND:WIDTH", through which spikes are attacked first, followed by "+detached" if the
    network was trained with detached resets. preprocessing: how images in [0, 1] become the file's input. variants:
    other files of the same network by precision. reference: the images' logits [N, K] in the framework in which the
    network was trained, which the file must match. recipe: settings of attacks and gate; its model, neuron and time
    steps are filled in. tier: how hard, and on how many of the images, the network is attacked; None: the tier of the
    recipe's gate. carry_images: store these images in the bundle; without them, golden inputs are noise.

    Raises InputError for files or images that do not fit together or cannot be attacked, EvaluationError if the file
    does not give the logits of the reference, or logits that are not finite.
    """
    out, base = out.resolve(), Recipe() if recipe is None else recipe
    named = _trained_through(surrogate)
    main = read_classifier(model, preprocessing)
    images = _fitting(relabelled(images, labels, main.classes), model, main)
    surveyed = survey(main.network, surrogate)
    if surveyed.refused:
        raise InputError(surveyed.refused)
    filled = _recipe(base, model, named, surveyed)
    ends = main.network.graph.input[0].name, main.network.graph.output[0].name
    tier = tier or filled.gate.tier
    attacked_images = images[: choose("tier", TIERS, tier).images]
    with staged(out) as scratch:
        float32 = scratch / model_file("fp32")
        parts = {"fp32": place_variant(model, main, float32, attacked_images, filled)}
        for name, file in variants.items():
            other = same_kind(file, read_classifier(file, preprocessing), main)
            parts[name] = place_variant(file, other, scratch / model_file(name), attacked_images, filled)
            # raises InputError if it cannot be attacked; the survey has checked that for float32
            attack_graph(other.network, surrogate)
        exact = _agrees(model, parts["fp32"].logits, reference)
        _warn_of_chance(parts["fp32"].logits, attacked_images)
        _warn_of_counts(parts["fp32"].logits)
        main = main._replace(network=onnx.ModelProto())  # free the memory for the attacks, which read the files
        written = {name: _variant(name, part, attacked_images, filled) for name, part in parts.items()}
        with OnnxRuntime(float32, settings=CHUNK) as predictor:
            network = NetworkFile(float32, predictor)
            logits = parts["fp32"].logits if reference is None else reference[: len(attacked_images)].astype(np.float32)
            figures, verdicts = promise(network, filled, attacked_images, tier, logits, of="fp32")
        save_reference(verdicts, scratch / REFERENCE)
        if carry_images:
            save_images(attacked_images, scratch / IMAGES)
        _save_golden(scratch, parts, attacked_images if carry_images else None, exact)
        return seal(
            scratch,
            out,
            input_name=ends[0],
            output_name=ends[1],
            input_shape=main.shape,
            labels=images.labels,
            recipe=filled,
            variants=written,
            reference=figures,
            origin=origin,
            provenance=_provenance(parts, preprocessing, surveyed, origin),
        )


def _trained_through(surrogate: str) -> SurrogateName:
    """Parse the surrogate. Raises InputError for one through which no network is trained."""
    named = parse_surrogate(surrogate)
    if named.averaged or named.kind in ATTACK_ONLY:
        raise InputError(
            f"surrogate {surrogate!r} exists only for attacks; choose one that networks are trained with: "
            f"{', '.join(KINDS)}"
        )
    return named


def _fitting(images: Images, model: Path, main: Classifier) -> Images:
    """Return the images. Raises InputError if there are none, or if the network takes others."""
    if not len(images):
        raise InputError(f"there are no images on which to attack {model}; give labelled images with --images")
    if images.shape != main.shape:
        raise InputError(f"the images have shape {images.shape}; {model} takes {main.shape} (C, H, W)")
    return images


def _recipe(base: Recipe, model: Path, named: SurrogateName, surveyed: Survey) -> Recipe:
    """Return the recipe with surrogate, time steps and, if spikes reset a membrane, the attack on the other resets."""
    also = dict.fromkeys([*base.attack.also, *([OTHER_RESETS[named.detached]] if surveyed.resets else [])])
    neuron = {"surrogate": named.kind, "surrogate_parameter": named.width, "detach_reset": named.detached}
    return base.model_copy(
        update={
            "model": base.model.model_copy(update={"name": model.stem}),
            "neuron": base.neuron.model_copy(update=neuron),
            "encoding": base.encoding.model_copy(update={"T": surveyed.steps}),
            "attack": base.attack.model_copy(update={"also": tuple(also)}),
        }
    )


def _agrees(model: Path, logits: NDArray[np.float32], reference: NDArray[np.float32] | None) -> NDArray[np.bool_]:
    """Return which rows [N] of the file's logits equal the reference's. Raises EvaluationError unless nearly all do."""
    if reference is None:
        return np.ones(len(logits), np.bool_)
    expected = reference[: len(logits)]
    if expected.shape != logits.shape:
        raise InputError(
            f"--reference holds logits {list(reference.shape)}, but {list(logits.shape)} are needed, a row for "
            "each image"
        )
    parity = compare(expected.astype(np.float32), logits)
    if not parity.holds:
        raise EvaluationError(
            f"{model} gives other logits than the framework it comes from ({parity}), so no bundle was written; "
            "compare the images and their preprocessing in both"
        )
    log.info("logits of the file compared with the reference: %s", parity)
    return np.asarray(np.abs(expected - logits).max(1) <= TOLERANCE)


def _warn_of_chance(logits: NDArray[np.float32], images: Images) -> None:
    accuracy, chance = float((logits.argmax(1) == images.classes).mean()), 1 / logits.shape[1]
    if accuracy <= 1.5 * chance:
        log.warning(
            "only %.1f %% of the images are classified correctly, no better than chance: the network may expect "
            "another range (--range 0,255), a normalisation (--mean, --std), other axes (--layout) or other labels",
            100 * accuracy,
        )


def _warn_of_counts(logits: NDArray[np.float32]) -> None:
    """Log a warning if the logits look like counts of spikes, which `mpdsgr validate` does not accept."""
    check = check_logits(logits)
    if check.failed:
        log.warning(
            "%s: `mpdsgr validate` will end INVALID (check %d), because such outputs give attacks no gradient to "
            "follow; let the network return the mean over time of the currents of its last layer, without "
            "neurons after it",
            check.saw,
            check.number,
        )


def _variant(name: str, part: AdoptedVariant, images: Images, recipe: Recipe) -> Variant:
    correct = int((part.logits.argmax(1) == images.classes).sum())
    accuracy = Accuracy(data=recipe.data.name, correct=correct, n=len(images))
    layers = {} if name == "fp32" else {"all": "as its file says"}
    return Variant(file=model_file(name), layers=layers, accuracy=accuracy)


def _save_golden(
    folder: Path, parts: Mapping[str, AdoptedVariant], images: Images | None, exact: NDArray[np.bool_]
) -> None:
    """Save the golden batch: images for which `exact` [N] holds, or noise without any, with each precision's logits."""
    if images is not None:
        logits = {name: part.logits for name, part in parts.items()}
        x = images.unit()
    else:
        x = np.random.default_rng(0).random((32, *parts["fp32"].classifier.shape), np.float32)
        logits = {}
        for name in parts:
            with OnnxRuntime(folder / model_file(name)) as network:
                logits[name] = network(x)
        exact = np.ones(len(x), np.bool_)
    save_golden(folder, x, logits, exact)


def _provenance(
    parts: Mapping[str, AdoptedVariant], preprocessing: Preprocessing | None, surveyed: Survey, origin: Origin
) -> dict[str, Any]:
    main = parts["fp32"]
    how = "byte for byte" if main.classifier.unchanged else "with preprocessing nodes in front"
    return {
        "export": provenance(),
        "checkpoint": f"{'adopted' if origin == 'adopted' else 'module exported'} from {main.file.name}, {how}",
        "adopted": {
            "files": {name: {"name": part.file.name, "sha256": sha256(part.file)} for name, part in parts.items()},
            "preprocessing": {} if preprocessing is None else preprocessing._asdict(),
            "unchanged": main.classifier.unchanged,
            "batch fixed at export": main.classifier.batch,
            "spike nodes": surveyed.spikes,
            "layers": surveyed.layers,
        },
    }
