"""Measure the firing rate of each layer of an exported network, image by image, together with the logits.

Export names spikes `spikes/LAYER/t`. In memory, the network gets one more output with their means. The spikes of a
Poisson encoding are not counted: they have no such name, because they belong to no layer.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.onnx_files import SPIKES, layer_of, read_network
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.machine_settings import prepared_settings
from mpdsgr_deploy.runtime.onnx_runtime import OnnxRuntime
from mpdsgr_deploy.runtime.open import check_golden
from mpdsgr_deploy.runtime.session import CPU, CUDA

OUTPUT = "firing_rate"
PROVIDERS = {"onnxruntime-cpu": CPU, "onnxruntime-cuda": CUDA}  # the backends that can return firing rates


class FiringRates(AbstractContextManager["FiringRates"]):
    """Maps images float32 [B, C, H, W] in [0, 1] to logits [B, K] and firing rates [B, L], both float32.

    A rate in [0, 1] is the mean of a layer's spikes over steps and neurons, for one image; `layers` names the L layers
    in the order of the network. In a network with gates (StoG) the spikes before the gates are counted, because these
    reset the membrane. A stochastic network gets the same noise as from `open_predictor`.

    network: the bundle's ONNX model, if it has been read already. The session closes at the end of a with block, and
    threads may share it. Raises InputError for a backend that cannot return spikes or cannot run here, and for a file
    that does not name its spikes; EvaluationError if the backend does not reproduce the golden logits.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "onnxruntime-cpu",
        precision: str = "fp32",
        *,
        network: onnx.ModelProto | None = None,
    ) -> None:
        if backend not in PROVIDERS:
            raise InputError(f"backend {backend} cannot return {OUTPUT}; choose one of: {', '.join(PROVIDERS)}")
        model, manifest = bundle.variant(precision), bundle.manifest
        network = read_network(model) if network is None else network
        steps = spike_names(network, model)
        self.layers = tuple(steps)
        # these settings were measured without the means, which are a small part of the work
        settings = prepared_settings(bundle, backend, precision) if PROVIDERS[backend] == CPU else None
        noise = NoiseSource(manifest.noise, manifest.recipe.validation.seed)
        observable = with_firing_rates(network, steps)
        self._network = OnnxRuntime(observable, PROVIDERS[backend], noise, settings=settings, source=model)
        check_golden(bundle, backend, precision, lambda x: self(x)[0])

    def __call__(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        logits, rates = self._network.answers(x)
        return logits, rates

    def __exit__(self, *exception: object) -> None:
        self._network.__exit__()


def spike_names(network: onnx.ModelProto, source: object) -> dict[str, list[str]]:
    """Return the names of each step's spikes, by layer in the order of the network.

    source: the name of the network in the error. Raises InputError if the network does not name its spikes.
    """
    steps: dict[str, list[str]] = {}
    for node in network.graph.node:
        for name in node.output:
            if name.startswith(SPIKES):
                layer = layer_of(name.removeprefix(SPIKES))
                steps.setdefault(layer, []).append(name)
    if not steps:
        raise InputError(f"{source} does not name its spikes, so it cannot return {OUTPUT}; export the network again")
    return steps


def with_firing_rates(network: onnx.ModelProto, steps: Mapping[str, list[str]]) -> onnx.ModelProto:
    """Return a copy of the network with one more output, `firing_rate` float32 [B, L], after its other outputs.

    steps: the names of each step's spikes, by layer. The mean over the neurons of each step is multiplied by a matrix
    that averages over steps. Both are float32 even if spikes are float16, which would round the mean.
    """
    observable = onnx.ModelProto()
    observable.CopyFrom(network)
    graph = observable.graph
    means = []
    for name in (name for names in steps.values() for name in names):
        exact, flat, mean = (f"{OUTPUT}/{name}/{part}" for part in ("float32", "flat", "mean"))
        graph.node.extend(
            [
                helper.make_node("Cast", [name], [exact], to=TensorProto.FLOAT),
                helper.make_node("Flatten", [exact], [flat], axis=1),
                helper.make_node("ReduceMean", [flat, f"{OUTPUT}/axes"], [mean], keepdims=1),
            ]
        )
        means.append(mean)
    counts = [len(names) for names in steps.values()]
    over_steps = np.repeat(np.eye(len(counts)) / counts, counts, axis=0).astype(np.float32)  # [steps of all layers, L]
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1]), f"{OUTPUT}/axes"),
            numpy_helper.from_array(over_steps, f"{OUTPUT}/over_steps"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Concat", means, [f"{OUTPUT}/means"], axis=1),
            helper.make_node("MatMul", [f"{OUTPUT}/means", f"{OUTPUT}/over_steps"], [OUTPUT]),
        ]
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0].dim_param or None
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, len(steps)]))
    return observable
