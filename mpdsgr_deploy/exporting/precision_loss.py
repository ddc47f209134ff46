"""Measure how much accuracy precision variants lose on clean and on attacked images, and limit the loss."""

from collections.abc import Mapping
from math import inf, isnan
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.bundle import Accuracy, Variant, model_file
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import EvaluationError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.exporting.precision import convert, plan
from mpdsgr_deploy.progress import log, track
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime, predict
from mpdsgr_deploy.runtime.torch_model import TorchModel

FINER = {"fp16": "fp32", "int8": "fp16", "fp8": "fp16"}  # the next finer precision of a layer
Answers = dict[str, NDArray[np.float32]]  # logits [N, K] of the images "clean" and "attacked"


class Trial:
    """Writes the variants of a float32 graph to `folder`, and measures them on test images.

    network: the torch network of the graph. attacked: measure also on images that the recipe's PGD has attacked through
    the torch network; all variants get the same images.
    """

    def __init__(
        self, graph: ir.Model, network: TorchModel, recipe: Recipe, images: Images, folder: Path, *, attacked: bool
    ) -> None:
        self._graph, self._recipe, self._folder, self._noise = graph, recipe, folder, network.noise
        self._classes = images.classes
        self._images = {"clean": images.unit()}
        if attacked:
            self._images["attacked"] = attack(network, recipe, images)
        self._exact = self._answers("fp32", plan(graph, "fp32"))

    def variant(self, precision: str, max_drop: float | None) -> Variant:
        """Write a variant, with layers in a finer precision if max_drop requires it, and return its manifest entry.

        max_drop: the largest loss of accuracy against fp32, as a share of the images; None sets no limit. Raises
        EvaluationError if the loss is larger even with every layer in the finer precision.
        """
        layers = plan(self._graph, precision)
        answers = self._exact if precision == "fp32" else self._answers(precision, layers)
        if precision == "fp32":
            max_drop = None
        if max_drop is not None and drop(self._exact, answers, self._classes) > max_drop:
            layers, answers = self._within(max_drop, precision, layers)
        accuracies = {name: self._accuracy(logits) for name, logits in answers.items()}
        clean, attacked = accuracies["clean"], accuracies.get("attacked")
        return Variant(file=model_file(precision), layers=layers, accuracy=clean, attacked=attacked)

    def _within(self, max_drop: float, precision: str, layers: dict[str, str]) -> tuple[dict[str, str], Answers]:
        """Change layers to a finer precision until max_drop holds, beginning with those that change the logits most.

        Returns the precision of each layer, and the logits of the variant.
        """
        coarse = [name for name, chosen in layers.items() if chosen == precision]
        log.info(
            "%s loses more than %.2f %% of accuracy; measuring each of its %d layers",
            precision,
            100 * max_drop,
            len(coarse),
        )
        shifts = {name: self._shift(precision, name) for name in track(coarse, "each layer alone")}
        for name in sorted(coarse, key=lambda name: -shifts[name]):
            layers = {**layers, name: FINER[precision]}
            answers = self._answers(precision, layers)
            lost = drop(self._exact, answers, self._classes)
            log.info("with %s in %s the loss is %.2f %%", name, FINER[precision], 100 * lost)
            if lost <= max_drop:
                return layers, answers
        raise EvaluationError(
            f"{precision} loses {lost:.2%} of accuracy even with every layer in {FINER[precision]}, so no bundle "
            f"was written; leave {precision} out, or raise --max-drop"
        )

    def _answers(self, precision: str, layers: Mapping[str, str]) -> Answers:
        """Write the variant's file, which replaces one of an earlier choice of layers, and compute its logits."""
        file = self._folder / model_file(precision)
        save(convert(self._graph, layers), file)
        with OnnxRuntime(file, noise=self._noise) as network:
            size = self._recipe.validation.batch_size
            return {name: predict(network, x, size, f"{precision}, {name}") for name, x in self._images.items()}

    def _accuracy(self, logits: NDArray[np.float32]) -> Accuracy:
        return Accuracy(data=self._recipe.data.name, correct=right(logits, self._classes), n=len(self._classes))

    def _shift(self, precision: str, layer: str) -> float:
        """Return the mean absolute change of the logits if only this layer has the precision; inf if it overflows."""
        answers = self._answers(precision, {**plan(self._graph, "fp32"), layer: precision})
        shift = float(np.mean([np.abs(logits - self._exact[name]).mean() for name, logits in answers.items()]))
        return inf if isnan(shift) else shift


def right(logits: NDArray[np.float32], classes: NDArray[np.int64]) -> int:
    """Return how many images the logits [N, K] classify as `classes` [N]."""
    return int((logits.argmax(1) == classes).sum())


def drop(exact: Answers, answers: Answers, classes: NDArray[np.int64]) -> float:
    """Return the loss of accuracy against `exact` as a share of the images, clean or attacked, whichever is larger.

    It is computed with a single division, so that 1 image of 100 is exactly the 0.01 that a user writes.
    """
    return max(right(exact[name], classes) - right(logits, classes) for name, logits in answers.items()) / len(classes)


def attack(network: TorchModel, recipe: Recipe, images: Images) -> NDArray[np.float32]:
    """Attack the images by the recipe's PGD, from a random start, through the torch network.

    Returns the last iterates, float32 [N, C, H, W] in [0, 1].
    """
    config, size = recipe.attack, recipe.validation.batch_size
    target = network.attacker(draws=config.draws)
    generator = np.random.default_rng(recipe.validation.seed)

    def batch(start: int) -> NDArray[np.float32]:
        part = images[start : start + size]
        attacked: NDArray[np.float32] = pgd(
            target,
            part.unit(),
            part.classes,
            eps=config.eps,
            step=config.step,
            steps=config.steps,
            draw=lambda shape: generator.uniform(-1, 1, shape).astype(np.float32),
        )
        return attacked

    return np.concatenate([batch(start) for start in track(range(0, len(images), size), "attacking")])
