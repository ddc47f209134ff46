"""Open a bundle on a named backend, and check on its golden batch that the logits are right."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.registry import Registry
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.machine_settings import prepared_settings
from mpdsgr_deploy.runtime.onnx_runtime import OnnxRuntime
from mpdsgr_deploy.runtime.openvino import OpenVino
from mpdsgr_deploy.runtime.session import CPU, CUDA, TENSORRT
from mpdsgr_deploy.runtime.tensorrt import TensorRT


def _onnxruntime_cpu(bundle: Bundle, precision: str, noise: NoiseSource) -> OnnxRuntime:
    settings = prepared_settings(bundle, "onnxruntime-cpu", precision)
    return OnnxRuntime(bundle.variant(precision), CPU, noise, settings=settings)


def _onnxruntime_gpu(bundle: Bundle, precision: str, noise: NoiseSource, *, provider: str) -> OnnxRuntime:
    if provider == TENSORRT and precision != "fp32":  # it chooses number types itself, unless everything is float32
        raise InputError(
            "onnxruntime-tensorrt would also compute the neurons in reduced precision; use --backend tensorrt"
        )
    return OnnxRuntime(bundle.variant(precision), provider, noise)


def _openvino(bundle: Bundle, precision: str, noise: NoiseSource) -> OpenVino:
    if "fp16" in bundle.manifest.variants[precision].layers.values():
        log.info("openvino computes float16 networks in float32; use onnxruntime-cpu for the network's own rounding")
    return OpenVino(bundle.variant(precision), noise, settings=prepared_settings(bundle, "openvino", precision))


def _torch(bundle: Bundle, precision: str, noise: NoiseSource, *, compiled: bool) -> AbstractContextManager[Predictor]:
    need("torch", "train")
    if precision != "fp32":
        raise InputError("the backend torch runs only fp32; use onnxruntime-cpu for other precisions")
    from mpdsgr_deploy.runtime.torch_model import TorchModel

    model = TorchModel.from_bundle(bundle, noise)
    return model.compiled() if compiled else model


Opener = Callable[[Bundle, str, NoiseSource], AbstractContextManager[Predictor]]
BUILT_IN: dict[str, Opener] = {
    "onnxruntime-cpu": _onnxruntime_cpu,
    "onnxruntime-cuda": partial(_onnxruntime_gpu, provider=CUDA),
    "onnxruntime-tensorrt": partial(_onnxruntime_gpu, provider=TENSORRT),
    "openvino": _openvino,
    "tensorrt": partial(TensorRT.from_bundle, "tensorrt"),
    "tensorrt-rtx": partial(TensorRT.from_bundle, "tensorrt-rtx"),
    "torch": partial(_torch, compiled=False),
    "torch-compile": partial(_torch, compiled=True),
}
BACKENDS = Registry("backend", "mpdsgr_deploy.backends", BUILT_IN)
DEFAULT_BACKEND = "onnxruntime-cpu"


@contextmanager
def open_predictor(
    bundle: Bundle, backend: str = DEFAULT_BACKEND, precision: str = "fp32", *, seed: int | None = None
) -> Iterator[Predictor]:
    """Open a Predictor of a bundle's network for a with block.

    seed: that of a stochastic network's noise; None: the recipe's `validation.seed`, which everyone with the bundle
    knows. Raises InputError for an unknown backend or precision and for a backend that cannot run here, EvaluationError
    as `check_golden` does.
    """
    bundle.variant(precision)  # raises for an unknown precision
    noise = NoiseSource(bundle.manifest.noise, bundle.manifest.recipe.validation.seed)
    with BACKENDS.choose(backend)(bundle, precision, noise) as predictor:
        check_golden(bundle, backend, precision, predictor)
        if seed is not None:
            noise.reseed(seed)  # only after the golden batch, whose logits belong to the recipe's seed
        yield predictor


def check_golden(bundle: Bundle, backend: str, precision: str, predictor: Predictor) -> None:
    """Raise EvaluationError unless `predictor` gives every image of the golden batch the label of its stored logits.

    In a precision that is the same on every machine, at least half of the images must also have the stored logits
    within the tolerance of `parity`: another CPU rounds differently and may flip a spike on an image or two, but
    another network differs on all. The predictor's noise must still be that of the recipe's seed, with which the golden
    logits were computed.
    """
    inputs, logits = bundle.golden(precision)
    parity = compare(logits, predictor(inputs))
    exact = bundle.manifest.variants[precision].exact
    if parity.labels_differ or (exact and parity.within_tolerance < parity.rows / 2):
        raise EvaluationError(
            f"{backend} answers the bundle's golden batch wrongly ({parity}); export again on this machine, or use "
            "another backend"
        )
