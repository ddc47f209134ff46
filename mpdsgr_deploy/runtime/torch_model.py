"""A torch network as a Predictor and as a Differentiable: the reference with which an artefact is compared."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mpdsgr_deploy.attacks import expectation
from mpdsgr_deploy.attacks.attacker_surrogate import with_surrogate
from mpdsgr_deploy.attacks.torch_target import AdaptiveTorch, Loss, cross_entropy, dlr, input_gradient, margin, weighted
from mpdsgr_deploy.bundle import Bundle, NoiseInput
from mpdsgr_deploy.errors import InputError, OutOfMemory, one_line
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.protocols import Adaptive, Differentiable, Gradient, State
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.snn.compiled import quiet_compiler
from mpdsgr_deploy.snn.draws import Kind
from mpdsgr_deploy.trained_networks import load_bundled

NO_MEMORY = "can't allocate memory"  # part of torch's message on a CPU, for which it has no error class


def exact_convolutions() -> AbstractContextManager[None]:
    """Disable TF32, whose ten bits of mantissa would flip spikes, and nondeterministic algorithms of cuDNN."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Raise OutOfMemory with the words "for `what`" if torch runs out of memory in a with block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error):
            raise OutOfMemory(
                f"torch has too little memory for {what}; free some memory or use a smaller batch"
            ) from error
        raise


@torch.no_grad()
def noise_inputs(model: SpikingNet, shape: tuple[int, int, int]) -> tuple[NoiseInput, ...]:
    """Return the noise that `model`, in eval mode, draws in a pass over images [B, *shape]; () if it draws none."""
    draws: list[NoiseInput] = []

    def draw(kind: Kind, steps: int, x: torch.Tensor) -> torch.Tensor:
        draws.append(NoiseInput(name=f"{kind}_{len(draws)}", kind=kind, shape=(steps, *x.shape[1:])))
        return x.new_zeros(steps, *x.shape)

    if model.stochastic:
        model(torch.zeros(1, *shape, device=model.normalize.mean.device), None, draw)
    return tuple(draws)


class TorchModel(AbstractContextManager["TorchModel"]):
    """A Predictor for a torch network, on the GPU if there is one. The end of a with block frees the GPU's memory.

    shape: (C, H, W) of an image. A stochastic network gets the noise that `noise` draws for each image (None: a source
    of `seed`), as its exported form does. Its attackers draw other noise, from a generator of `seed` + 1 and anew for
    every gradient, so that no attack is fitted to the noise of the final answers. Raises InputError if `noise` is not
    what the network draws, OutOfMemory if memory runs out.
    """

    def __init__(
        self, model: SpikingNet, shape: tuple[int, int, int], seed: int = 0, noise: NoiseSource | None = None
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape, self._seed = shape, seed
        with memory_errors("the network"):
            self._model = model.to(self._device).eval()
        self._forward: Callable[..., torch.Tensor] = self._model
        self._draws = noise_inputs(self._model, shape)
        self.noise = NoiseSource(self._draws, seed) if noise is None else noise
        self.noise.require({entry.name: entry.shape for entry in self._draws}, "the torch model")

    @classmethod
    def from_bundle(cls, bundle: Bundle, noise: NoiseSource | None = None) -> Self:
        """Load the network of the bundle's recipe with its weights. Raises InputError for a bundle without weights."""
        model, manifest = load_bundled(bundle, otherwise="use another backend"), bundle.manifest
        return cls(model, manifest.input_shape, manifest.recipe.validation.seed, noise)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        check_images(x, self.shape)
        noise = self.noise(x)
        with memory_errors(f"a batch of {len(x)}"), torch.no_grad(), exact_convolutions():
            draws = [self.tensor(noise[entry.name]) for entry in self._draws]
            logits: NDArray[np.float32] = self._forward(self.tensor(x), None, draws).cpu().numpy()
        return logits

    def compiled(self) -> Self:
        """Compute logits (not gradients) with torch.compile from now on, and return this model.

        The network is compiled at most three times, for 1, for 2 to 7, and for 8 or more images, which takes tens of
        seconds each. Fixed batch sizes would not be faster, and would be compiled more often. If there is no C++
        compiler, a call raises InputError.
        """
        from torch._inductor.exc import InductorError  # imported here, because it loads the whole compiler

        quiet_compiler()
        forward = torch.compile(self._model, dynamic=True)

        def answer(*arguments: Any) -> torch.Tensor:
            try:
                logits: torch.Tensor = forward(*arguments)
            except InductorError as error:
                reason = one_line(str(error).partition("\n")[0])  # the other lines are advice to developers
                raise InputError(
                    f"torch.compile cannot build the network here ({reason}); install a C++ compiler and Python's "
                    f"headers, or use the backend torch"
                ) from error
            return logits

        self._forward = answer
        return self

    def attacker(self, surrogate: str | None = None, *, loss: Loss = cross_entropy, draws: int = 1) -> Differentiable:
        """Return a Differentiable of the network, through `surrogate` or (None) that of training.

        loss: what an attack maximises. draws: the number of draws of its noise over which a stochastic network's
        gradient is averaged. Raises InputError for an unknown surrogate.
        """
        model = self._model if surrogate is None else with_surrogate(self._model, surrogate)
        noise = torch.Generator().manual_seed(self._seed + 1)

        def gradient(x: NDArray[np.float32], y: NDArray[np.int64]) -> Gradient:
            check_images(x, self.shape)
            with memory_errors(f"the gradients of {len(x)} images"), exact_convolutions():
                answer = input_gradient(lambda x: model(x, None, noise), self.tensor(x), self.tensor(y), loss)
            return Gradient(*(tensor.cpu().numpy() for tensor in answer))

        return expectation(gradient, draws) if model.stochastic else gradient

    def adaptive_attacker(self, *, draws: int = 1) -> Adaptive:
        """Return the network differentiated through adaptive surrogates (ASSG). draws: as for `attacker`."""
        noise = torch.Generator().manual_seed(self._seed + 1)
        return _AdaptiveArrays(self, AdaptiveTorch(self._model, self.shape, noise), draws if self.stochastic else 1)

    @property
    def stochastic(self) -> bool:
        return self._model.stochastic

    def tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def __exit__(self, *exception: object) -> None:
        self._model.cpu()  # frees GPU memory


class _AdaptiveArrays:
    """`AdaptiveTorch` for numpy arrays, with gradients and states averaged over draws of the noise."""

    def __init__(self, model: TorchModel, target: AdaptiveTorch, draws: int) -> None:
        self._model, self._target, self._draws = model, target, draws

    def start(self, count: int) -> State:
        return {name: value.cpu().numpy() for name, value in self._target.start(count).items()}

    def step(self, x: NDArray[np.float32], y: NDArray[np.int64], state: State) -> tuple[Gradient, State]:
        check_images(x, self._model.shape)
        images, classes = self._model.tensor(x), self._model.tensor(y)
        before = {name: self._model.tensor(value) for name, value in state.items()}
        with memory_errors(f"the gradients of {len(x)} images"), exact_convolutions():
            steps = [self._target.step(images, classes, before) for _ in range(self._draws)]
        averaged = [torch.stack(parts).mean(0) for parts in zip(*(gradient for gradient, _ in steps), strict=True)]
        next_state = {name: torch.stack([after[name] for _, after in steps]).mean(0).cpu().numpy() for name in state}
        return Gradient(*(part.cpu().numpy() for part in averaged)), next_state


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin, "weighted": weighted}


class TorchNetwork:
    """A TorchModel as a `Network` of the attacks."""

    def __init__(self, model: TorchModel) -> None:
        self._model, self.stochastic = model, model.stochastic

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._model(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]:
        """Provide `TorchModel.attacker` for a with block. loss: a key of LOSSES.

        Raises InputError for an unknown surrogate.
        """
        return nullcontext(self._model.attacker(surrogate, loss=LOSSES[loss], draws=draws))

    def adaptive(self, *, draws: int) -> AbstractContextManager[Adaptive]:
        return nullcontext(self._model.adaptive_attacker(draws=draws))
