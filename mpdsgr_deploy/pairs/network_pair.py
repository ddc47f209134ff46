"""Run both networks on the same images: compare their spikes, their membrane potentials and their right answers."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.diagnostics.membrane import RANGE, Membrane
from mpdsgr_deploy.diagnostics.trace import Recorder, Recording, batches
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.onnx_files import layer_of
from mpdsgr_deploy.pairs.side import Side
from mpdsgr_deploy.pairs.verdicts import PairedVerdict
from mpdsgr_deploy.runtime import NoiseSource
from mpdsgr_deploy.surrogates import trained_half_width
from mpdsgr_deploy.validation.image_checks import evaluation_images

BINS = 160  # bins of a histogram
Floats = NDArray[np.float32]


class LayerPair(NamedTuple):
    """One layer of both networks. All numbers are shares in [0, 1] of its neurons over all steps and images.

    spikes_differ: None if the layers have other neurons or steps; in_window: the potentials in the surrogate's window;
    overlap: the common area of both histograms of potentials, 1 if they are equal.
    """

    layer: str
    firing_rate: tuple[float, float]
    spikes_differ: float | None
    in_window: tuple[float, float]
    overlap: float
    membranes: tuple[Membrane, Membrane]


class SharedImages(NamedTuple):
    """A description of images, the images [N, C, H, W] in [0, 1], and their classes [N] (None for golden inputs)."""

    where: str
    pixels: NDArray[np.float32]
    classes: NDArray[np.int64] | None


class NetworkPair(NamedTuple):
    """The layers that both networks have, in the order of computation, and clean verdicts, if classes are known.

    where: a description of the images.
    """

    where: str
    layers: list[LayerPair]
    clean: PairedVerdict | None


def paired_networks(a: Side, b: Side, *, root: str | None = None, images: int = 128) -> NetworkPair:
    """Run both networks on the first test images: those in a bundle, else those of the data set, else golden inputs.

    root: the directory of the data set. Raises InputError for a report, for networks of different images, for missing
    data, for an ONNX file that does not name its spikes, and for a checkpoint if torch is missing.
    """
    networks = open_network(a), open_network(b)
    shared = shared_images(a, b, root, images)
    tallies: dict[str, tuple[_LayerTally, _LayerTally]] = {}
    predicted = []
    for batch in batches(shared.pixels, "comparing networks"):
        recordings = [network(batch) for network in networks]
        predicted.append([recording.logits.argmax(1) for recording in recordings])
        left, right = map(by_layer, recordings)
        for layer in (name for name in left if name in right):
            of_a, of_b = tallies.setdefault(layer, (_LayerTally(a), _LayerTally(b)))
            of_a.add(left[layer], right[layer])
            of_b.add(right[layer], left[layer])
    clean = None
    if shared.classes is not None:
        answers = (np.concatenate(labels) for labels in zip(*predicted, strict=True))
        clean = PairedVerdict.of(CLEAN, *(labels == shared.classes for labels in answers))
    return NetworkPair(shared.where, [layer_pair(layer, *pair) for layer, pair in tallies.items()], clean)


def open_network(side: Side) -> Callable[[Floats], Recording]:
    """Return a side's network as a function from images [B, C, H, W] to its potentials, spikes and logits.

    Raises InputError for a report, and for a checkpoint if torch is missing.
    """
    if side.bundle is not None:
        manifest = side.bundle.manifest
        noise = NoiseSource(manifest.noise, manifest.recipe.validation.seed)
        return Recorder(onnx.load(side.bundle.variant(side.precision)), noise)
    if side.checkpoint is None:
        raise InputError(f"{side.name} is a report, which holds no network; give its bundle instead")
    need("torch", "train")
    from mpdsgr_deploy.diagnostics.torch_trace import TorchRecorder
    from mpdsgr_deploy.trained_networks import load_network

    checkpoint, model = load_network(side.directory)
    return TorchRecorder(model, checkpoint.shape, checkpoint.recipe.validation.seed)


def shared_images(a: Side, b: Side, root: str | None, count: int) -> SharedImages:
    """Return the first `count` test images of both networks; see `paired_networks`, also for the errors."""
    for what, left, right in zip(("data", "shape", "labels"), a.images or (), b.images or (), strict=False):
        if left != right:
            raise InputError(f"the two are for different images: {what} {left}, and {right}")
    bundle = a.bundle or b.bundle
    recipe = a.recipe or b.recipe
    assert recipe is not None
    try:
        images = load_test(recipe.data.at(root)) if bundle is None else evaluation_images(bundle, None, root)
    except MissingData:
        if bundle is None or root is not None:
            raise
        golden, _ = bundle.golden()
        return SharedImages(f"{len(golden)} golden inputs; give --root to use test images", golden, None)
    sample = images[:count]
    return SharedImages(name_sample(len(sample), recipe.data.name), sample.unit(), sample.classes)


def by_layer(recording: Recording) -> dict[str, list[tuple[Floats, Floats]]]:
    """Return the potentials and spikes [B, ...] of each step, by layer."""
    layers: dict[str, list[tuple[Floats, Floats]]] = {}
    for step, spikes in recording.spikes.items():
        layers.setdefault(layer_of(step), []).append((recording.potentials[step], spikes))
    return layers


class _LayerTally:
    """Sums over the neurons, steps and images of one layer of one network, and differences from another network."""

    def __init__(self, side: Side) -> None:
        assert side.recipe is not None
        self.v_threshold, self.half_width = side.recipe.neuron.v_threshold, trained_half_width(side.recipe)
        self.neurons, self.spikes, self.in_window, self.differing = 0, 0.0, 0, 0
        self.same_shape = True
        self.counts = np.zeros(BINS, np.int64)

    def add(self, steps: list[tuple[Floats, Floats]], other: list[tuple[Floats, Floats]]) -> None:
        self.same_shape = [s.shape for _, s in steps] == [s.shape for _, s in other]
        for t, (potentials, spikes) in enumerate(steps):
            v = potentials - self.v_threshold
            self.neurons += v.size
            self.spikes += float(spikes.sum(dtype=np.float64))
            self.in_window += int((np.abs(v) < self.half_width).sum())
            self.counts += np.histogram(v, BINS, RANGE)[0]
            if self.same_shape:
                self.differing += int((spikes != other[t][1]).sum())

    def membrane(self, layer: str) -> Membrane:
        share = (self.counts / self.neurons).tolist()
        width = (RANGE[1] - RANGE[0]) / BINS
        return Membrane(layer=layer, half_width=self.half_width, start=RANGE[0], width=width, share=share)


def layer_pair(layer: str, a: _LayerTally, b: _LayerTally) -> LayerPair:
    left, right = a.membrane(layer), b.membrane(layer)
    outside = min(1 - sum(left.share), 1 - sum(right.share))
    return LayerPair(
        layer=layer,
        firing_rate=(a.spikes / a.neurons, b.spikes / b.neurons),
        spikes_differ=a.differing / a.neurons if a.same_shape else None,
        in_window=(a.in_window / a.neurons, b.in_window / b.neurons),
        overlap=sum(map(min, left.share, right.share)) + outside,
        membranes=(left, right),
    )
