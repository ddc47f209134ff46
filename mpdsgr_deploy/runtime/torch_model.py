"""A torch network as a Predictor and as a Differentiable: the reference an artefact is held against."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mpdsgr_deploy.attacks import expectation
from mpdsgr_deploy.attacks.attacker_surrogate import with_surrogate
from mpdsgr_deploy.attacks.torch_target import Loss, cross_entropy, input_gradient
from mpdsgr_deploy.bundle import WEIGHTS, Bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint, load_model
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.protocols import Differentiable, Gradient
from mpdsgr_deploy.runtime.images import check_images


def exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN without TF32, whose ten bits of mantissa would flip spikes, and without nondeterministic algorithms."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


class TorchModel:
    """Runs on the GPU if there is one. `shape` is (C, H, W) of the input; numpy in, fresh numpy out.

    A stochastic network answers with the noise of `seed`, the same in every call; its attackers draw other noise, fresh
    for every gradient, so that none is fitted to the noise the answers will have.
    """

    def __init__(self, model: SpikingNet, shape: tuple[int, int, int], seed: int = 0) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._shape, self._seed = model.to(self._device).eval(), shape, seed
        self._forward: Callable[..., torch.Tensor] = self._model

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """The network of the bundle's recipe with the bundle's weights."""
        manifest = bundle.manifest
        shape = manifest.input_shape
        model = load_model(bundle.file(WEIGHTS), manifest.recipe, shape, len(manifest.labels))
        return cls(model, shape, manifest.recipe.validation.seed)

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Self:
        """The network of a checkpoint, or of a training run's best one. Raises InputError as loading does."""
        source = find_checkpoint(directory)
        found = load_checkpoint(source)
        model = load_model(source / found.weights, found.recipe, found.shape, len(found.labels))
        return cls(model, found.shape, found.recipe.validation.seed)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self._shape)
        noise = torch.Generator().manual_seed(self._seed)
        with torch.no_grad(), exact_convolutions():
            logits: NDArray[np.float32] = self._forward(self._tensor(x), None, noise).cpu().numpy()
        return logits

    def compiled(self) -> Self:
        """The same model, whose answers (not its gradients) from now on come from torch.compile.

        A dynamic batch is compiled at most for 1, 2 to 7, and 8 or more images, tens of seconds each the first time;
        fixed sizes would be no faster and more of them. Raises InputError where there is no compiler.
        """
        from torch._inductor.exc import InductorError  # here: it loads the whole compiler

        forward = torch.compile(self._model, dynamic=True)

        def answer(*arguments: Any) -> torch.Tensor:
            try:
                logits: torch.Tensor = forward(*arguments)
            except InductorError as error:
                told = str(error).splitlines()[0]
                raise InputError(
                    f"torch.compile cannot build the network here ({told}); install a C++ compiler and Python's "
                    f"headers, or use the backend torch"
                ) from error
            return logits

        self._forward = answer
        return self

    def attacker(self, surrogate: str | None = None, *, loss: Loss = cross_entropy, draws: int = 1) -> Differentiable:
        """The network as an attacker differentiates it, through the training surrogate or the one named.

        draws: over how many draws of its noise a stochastic network's gradient is averaged. Raises InputError for an
        unknown surrogate.
        """
        model = self._model if surrogate is None else with_surrogate(self._model, surrogate)
        noise = torch.Generator().manual_seed(self._seed + 1)

        def gradient(x: NDArray[np.float32], y: NDArray[np.int64]) -> Gradient:
            check_images(x, self._shape)
            with exact_convolutions():
                found = input_gradient(lambda x: model(x, None, noise), self._tensor(x), self._tensor(y), loss)
            return Gradient(*(tensor.cpu().numpy() for tensor in found))

        return expectation(gradient, draws) if model.stochastic else gradient

    @property
    def stochastic(self) -> bool:
        """Whether the network draws noise."""
        return self._model.stochastic

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._model.cpu()  # frees GPU memory
