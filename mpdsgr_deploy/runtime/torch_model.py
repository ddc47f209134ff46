"""A torch network as a Predictor and as a Differentiable: the reference an artefact is held against."""

from contextlib import AbstractContextManager
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.bundle import WEIGHTS, Bundle
from mpdsgr_deploy.checkpoint import load_model
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.runtime.images import check_images


def exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN without TF32, whose ten bits of mantissa would flip spikes, and without nondeterministic algorithms."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


class TorchModel:
    """Runs on the GPU if there is one. `shape` is (C, H, W) of the input; numpy in, fresh numpy out."""

    def __init__(self, model: SpikingNet, shape: tuple[int, int, int]) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._shape = model.to(self._device).eval(), shape

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """The network of the bundle's recipe with the bundle's weights."""
        manifest = bundle.manifest
        shape = manifest.input_shape
        return cls(load_model(bundle.file(WEIGHTS), manifest.recipe, shape, len(manifest.labels)), shape)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        with torch.no_grad(), exact_convolutions():
            logits: NDArray[np.float32] = self._model(self._tensor(x)).cpu().numpy()
        return logits

    def gradient(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> Gradient:
        """The Differentiable: cross-entropy through the training surrogate."""
        check_images(x, self._shape)
        with exact_convolutions():
            found = input_gradient(self._model, self._tensor(x), self._tensor(y))
        return Gradient(*(tensor.cpu().numpy() for tensor in found))

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._model.cpu()  # frees GPU memory
