"""The interfaces of a model: Predictor (logits), Differentiable (gradients), Adaptive (surrogates that adapt)."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any  # a numpy array or a torch tensor; the output has the type of the input


class Predictor(Protocol):
    """Maps images float32 [B, C, H, W] in [0, 1] to freshly allocated float32 logits [B, K]."""

    def __call__(self, x: NDArray[np.float32], /) -> NDArray[np.float32]: ...


class Gradient(NamedTuple):
    """The result for a batch of images: logits [B, K], the loss of each image [B], and d loss / d x [B, C, H, W]."""

    logits: Array
    loss: Array
    gradient: Array


class Differentiable(Protocol):
    """Maps images x [B, C, H, W] and classes y [B] to a `Gradient`, in which each image has its own loss."""

    def __call__(self, x: Array, y: Array, /) -> Gradient: ...


State = Mapping[str, Array]  # arrays by name; the first axis of each is the images


class Adaptive(Protocol):
    """A Differentiable whose surrogates adapt to each image's neurons from one evaluation to the next (ASSG).

    `start` returns the state of the surrogates before an attack on `count` images, and each `step` takes the state and
    returns the next one. An attack that drops images takes the same rows of every array of the state.
    """

    def start(self, count: int, /) -> State: ...

    def step(self, x: Array, y: Array, state: State, /) -> tuple[Gradient, State]: ...
