"""Open a bundle on a named backend, and prove on its golden batch that it answers as it should."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.lookup import choose, need
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime.onnx_runtime import CPU, CUDA, TENSORRT, OnnxRuntime
from mpdsgr_deploy.runtime.openvino import OpenVino
from mpdsgr_deploy.runtime.settings import prepared_settings


def _onnxruntime_cpu(bundle: Bundle, precision: str) -> OnnxRuntime:
    settings = prepared_settings(bundle, "onnxruntime-cpu", precision)
    return OnnxRuntime(bundle.variant(precision), CPU, settings=settings)


def _onnxruntime_gpu(bundle: Bundle, precision: str, *, provider: str) -> OnnxRuntime:
    if provider == TENSORRT and precision != "fp32":  # it chooses types itself once any but float32 is allowed
        raise InputError(f"onnxruntime-tensorrt would compute neurons in {precision} too; use --backend tensorrt")
    return OnnxRuntime(bundle.variant(precision), provider)


def _openvino(bundle: Bundle, precision: str) -> OpenVino:
    return OpenVino(bundle.variant(precision), settings=prepared_settings(bundle, "openvino", precision))


def _torch(bundle: Bundle, precision: str, *, compiled: bool) -> AbstractContextManager[Predictor]:
    need("torch", "train")
    from mpdsgr_deploy.runtime.torch_model import TorchModel

    model = TorchModel.from_bundle(bundle)
    return model.compiled() if compiled else model


BACKENDS: dict[str, Callable[[Bundle, str], AbstractContextManager[Predictor]]] = {
    "onnxruntime-cpu": _onnxruntime_cpu,
    "onnxruntime-cuda": partial(_onnxruntime_gpu, provider=CUDA),
    "onnxruntime-tensorrt": partial(_onnxruntime_gpu, provider=TENSORRT),
    "openvino": _openvino,
    "torch": partial(_torch, compiled=False),
    "torch-compile": partial(_torch, compiled=True),
}
DEFAULT_BACKEND = "onnxruntime-cpu"


@contextmanager
def open_predictor(bundle: Bundle, backend: str = DEFAULT_BACKEND, precision: str = "fp32") -> Iterator[Predictor]:
    """A Predictor for the length of a with block.

    Raises InputError for an unknown backend or precision or a backend that cannot run here, EvaluationError if the
    golden batch is not answered with the reference's labels and logits.
    """
    bundle.variant(precision)  # also where the backend has one precision only
    with choose("backend", BACKENDS, backend)(bundle, precision) as predictor:
        inputs, logits = bundle.golden()
        parity = compare(logits, predictor(inputs))
        # another CPU rounds differently and may flip a spike on an image or two; another network differs on all
        if parity.labels_differ or (precision == "fp32" and parity.within_tolerance < parity.rows / 2):
            raise EvaluationError(f"{backend} answers the bundle's golden batch wrongly: {parity}; export again here")
        yield predictor
