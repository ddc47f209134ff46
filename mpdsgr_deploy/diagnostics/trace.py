"""Record the membrane potentials and spikes of an exported network, which its ONNX file names. Torch is not needed.

onnxruntime computes on the CPU: float16 values are rounded where the file says so, and quantised products are computed
in float32. Recordings of two precisions on one machine therefore differ only by the rounding in their files. Another
machine may add in another order.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.onnx_files import POTENTIAL, SPIKES
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.runtime import NoiseSource
from mpdsgr_deploy.runtime.float16_on_cpu import rounded_as_written
from mpdsgr_deploy.runtime.session import CPU, Session

REPLACEMENT = "replacement/"  # the input replacement/LAYER/t is used in place of spikes/LAYER/t
BATCH = 8  # images per batch, since the potentials of all layers and steps are in memory at once

Steps = dict[str, NDArray[np.float32]]


class Recording(NamedTuple):
    """Logits [B, K]; potentials and spikes [B, ...] by `LAYER/t` in the order of computation, t counted from 0."""

    logits: NDArray[np.float32]
    potentials: Steps
    spikes: Steps


class Recorder:
    """Runs an exported network and returns its potentials and spikes.

    noise: the noise of a stochastic network. replace_spikes: whatever reads spikes (the next layer, the neuron's own
    reset) reads spikes that the caller passes in, so that a layer's result depends on no other layer's rounding. Raises
    InputError without onnxruntime, and for a file that does not name its potentials and spikes.
    """

    def __init__(
        self, network: onnx.ModelProto, noise: NoiseSource | None = None, *, replace_spikes: bool = False
    ) -> None:
        computed_names = [name for node in network.graph.node for name in node.output]
        self.steps = [name.removeprefix(SPIKES) for name in computed_names if name.startswith(SPIKES)]
        if not self.steps or not {POTENTIAL + step for step in self.steps} <= set(computed_names):
            raise InputError("the ONNX file does not name its membrane potentials and spikes; export the network again")
        observable = rounded_as_written(network)
        names = [prefix + step for prefix in (POTENTIAL, SPIKES) for step in self.steps]
        # onnxruntime infers their types
        observable.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        if replace_spikes:
            _read_spikes_from_inputs(observable, self.steps)
        self._session = Session(observable, CPU, source="the network with its potentials and spikes")
        self._image, self._noise = network.graph.input[0].name, NoiseSource() if noise is None else noise

    def __call__(
        self, images: NDArray[np.float32], spikes: Mapping[str, NDArray[np.float32]] | None = None
    ) -> Recording:
        """Run the network on images [B, C, H, W] in [0, 1].

        spikes: required with `replace_spikes`, the spikes [B, ...] of every step by `LAYER/t`.
        """
        replacements = {REPLACEMENT + step: array for step, array in (spikes or {}).items()}
        feeds = {self._image: images, **self._noise(images), **replacements}
        logits, *values = self._session(feeds, self._session.outputs)
        potentials, spiked = values[: len(self.steps)], values[len(self.steps) :]
        return Recording(
            logits, dict(zip(self.steps, potentials, strict=True)), dict(zip(self.steps, spiked, strict=True))
        )


def _read_spikes_from_inputs(network: onnx.ModelProto, steps: list[str]) -> None:
    """Replace every use of spikes in the graph by a new input, `replacement/LAYER/t`."""
    replacements = {SPIKES + step: REPLACEMENT + step for step in steps}
    for node in network.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = replacements.get(name, name)
    new = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in replacements.values()]
    network.graph.input.extend(new)


def batches(images: NDArray[np.float32], what: str) -> Iterator[NDArray[np.float32]]:
    """Yield images [N, C, H, W] in batches, with a progress bar called `what`."""
    for start in track(range(0, len(images), BATCH), what):
        yield images[start : start + BATCH]
