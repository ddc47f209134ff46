"""Compare the spikes of a reduced precision with those of float32, by layer and time step.

A spike flips if rounding moves a membrane potential across the threshold. If the difference d of the two potentials is
independent of the potential, P(flip) = f(V_th) E|d| to first order, where f is the density of the potentials.
Therefore every rate comes with the density at the threshold and the mean |d|.

A flip changes the input of all layers behind it, so there are two rates. `rate` counts all flips. `fresh` counts those
that a layer's own rounding causes: the layer is computed once more with the spikes of the float32 network as its input
and in its resets. Differences start in layers with a large `fresh`; where `rate` is far above `fresh`, they come from
earlier layers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.diagnostics.trace import Recorder, Recording, Steps, batches
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.runtime import NoiseSource

REFERENCE = "fp32"
NEAR = 0.05  # the density is measured within this distance of the threshold, as a share of the threshold


class StepFlips(NamedTuple):
    """One layer at one step t, counted from 0. Shares and means are over all its neurons and all images.

    firing_rate, density: share of neurons that fire, and density of potentials at the threshold (per unit of
    potential), of the float32 network. rate: share of spikes that differ. moved: mean |difference| of the potentials.
    fresh, fresh_moved: the same from this layer's own rounding alone. first: number of images whose first flip, in the
    order of computation (layer by layer), is here.
    """

    layer: str
    t: int
    firing_rate: float
    density: float
    rate: float
    moved: float
    fresh: float
    fresh_moved: float
    first: int


class SpikeFlips(NamedTuple):
    """A reduced precision compared with float32 on the same n images.

    labels_changed: number of images with another prediction. logits_moved: mean |difference| of the logits.
    """

    precision: str
    n: int
    labels_changed: int
    unflipped: int  # images without any flip
    logits_moved: float
    steps: list[StepFlips]

    def mean(self, field: str, layer: str | None = None) -> float:
        """Return the mean of a field of `StepFlips` over the steps of one layer, or of all layers."""
        return float(np.mean([getattr(step, field) for step in self.steps if layer in (None, step.layer)]))

    def layers(self) -> list[str]:
        """Return the names of the layers in the order of computation."""
        return list(dict.fromkeys(step.layer for step in self.steps))


def flips_of(bundle: Bundle, *, root: str | None = None, images: int = 128) -> tuple[str, list[SpikeFlips]]:
    """Compare every reduced precision of a bundle with float32; return a description of the images, and the flips.

    root: directory of the data set, in place of the recipe's. images: number of test images, the first ones. Without
    `root`, the golden inputs replace test images that are not on this machine. Raises InputError for a bundle with one
    precision, for a `root` without the data, and without onnxruntime.
    """
    variants = {name: bundle.variant(name) for name in bundle.manifest.variants if name != REFERENCE}
    reference = onnx.load(bundle.variant(REFERENCE))
    if not variants:
        raise InputError(
            f"{bundle.path} has only one precision, so there is nothing to compare; export it with --precision "
            f"{REFERENCE},int8"
        )
    description, x = _images(bundle, root, images)
    recipe = bundle.manifest.recipe
    networks = {name: onnx.load(file) for name, file in variants.items()}
    noise = NoiseSource(bundle.manifest.noise, recipe.validation.seed)
    return description, compare_spikes(reference, networks, x, recipe.neuron.v_threshold, noise)


def _images(bundle: Bundle, root: str | None, count: int) -> tuple[str, NDArray[np.float32]]:
    """Return a description of the images, and the images [N, C, H, W]."""
    manifest = bundle.manifest
    data = manifest.recipe.data
    try:
        test_images = load_test(data.at(root))
    except MissingData as error:
        if root is not None:
            raise
        golden, _ = bundle.golden()
        return f"{len(golden)} golden inputs ({error})", golden
    test_images.require_kind(data.name, manifest.input_shape, manifest.labels)
    sample = test_images[:count]
    return name_sample(len(sample), data.name), sample.unit()


def compare_spikes(
    reference: onnx.ModelProto,
    variants: Mapping[str, onnx.ModelProto],
    images: NDArray[np.float32],
    v_threshold: float,
    noise: NoiseSource | None = None,
) -> list[SpikeFlips]:
    """Compare each of `variants` with the float32 network `reference` on images [N, C, H, W] in [0, 1].

    noise: the noise of a stochastic network, the same for all networks. Raises InputError as `Recorder` does.
    """
    record_reference = Recorder(reference, noise)
    recorders = {
        name: (Recorder(variant, noise), Recorder(variant, noise, replace_spikes=True))
        for name, variant in variants.items()
    }
    counters = {name: _Counter(record_reference.steps, v_threshold) for name in variants}
    for batch in batches(images, "comparing spikes"):
        expected = record_reference(batch)
        for name, (record, record_each_layer) in recorders.items():
            counters[name].add(expected, record(batch), record_each_layer(batch, expected.spikes))
    return [counter.flips(name) for name, counter in counters.items()]


class _Counter:
    """Accumulates the differences between one variant and float32 over batches."""

    def __init__(self, steps: list[str], v_threshold: float) -> None:
        self.steps, self.v_threshold, self.n = steps, v_threshold, 0
        self.sums = {step: np.zeros(6) for step in steps}  # the six rates and means of StepFlips
        self.first = np.zeros(len(steps) + 1, np.int64)  # the last entry counts images without a flip
        self.labels_changed, self.logits_moved = 0, 0.0

    def add(self, expected: Recording, recorded: Recording, fresh: Recording) -> None:
        """Add one batch, recorded in float32 and in the variant; `fresh`: in the variant, with float32's spikes."""
        size = len(expected.logits)
        width = NEAR * self.v_threshold
        flipped_images = []
        for step in self.steps:
            flipped = expected.spikes[step] != recorded.spikes[step]
            near = np.abs(expected.potentials[step] - self.v_threshold) < width
            self.sums[step] += size * np.array(
                [
                    expected.spikes[step].mean(dtype=np.float64),
                    near.mean() / (2 * width),
                    flipped.mean(),
                    _moved(expected.potentials, recorded.potentials, step),
                    (expected.spikes[step] != fresh.spikes[step]).mean(),
                    _moved(expected.potentials, fresh.potentials, step),
                ]
            )
            flipped_images.append(flipped.reshape(size, -1).any(1))
        first = np.stack([*flipped_images, np.ones(size, bool)]).argmax(0)  # [B]
        self.first += np.bincount(first, minlength=len(self.first))
        self.labels_changed += int((expected.logits.argmax(1) != recorded.logits.argmax(1)).sum())
        self.logits_moved += float(np.abs(expected.logits - recorded.logits).mean(1).sum())
        self.n += size

    def flips(self, precision: str) -> SpikeFlips:
        steps = []
        for step, first in zip(self.steps, self.first[:-1].tolist(), strict=True):
            layer, _, t = step.rpartition("/")
            firing_rate, density, rate, moved, fresh, fresh_moved = (self.sums[step] / self.n).tolist()
            steps.append(StepFlips(layer, int(t), firing_rate, density, rate, moved, fresh, fresh_moved, first))
        return SpikeFlips(
            precision, self.n, self.labels_changed, int(self.first[-1]), self.logits_moved / self.n, steps
        )


def _moved(expected: Steps, recorded: Steps, step: str) -> float:
    return float(np.abs(expected[step] - recorded[step]).mean(dtype=np.float64))
