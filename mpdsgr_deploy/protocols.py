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
    """The result at a batch of images: logits [B, K], the loss of each sample [B], and d loss / d x [B, C, H, W]."""

    logits: Array
    loss: Array
    gradient: Array


class Differentiable(Protocol):
    """Maps images x [B, C, H, W] and classes y [B] to a `Gradient`; each sample's gradient is of its own loss."""

    def __call__(self, x: Array, y: Array, /) -> Gradient: ...


State = Mapping[str, Array]  # by name; the first axis of every array is the images


class Adaptive(Protocol):
    """A Differentiable whose surrogates adapt to each image's neurons from one evaluation to the next (ASSG).

    The state of the surrogates is an argument: `start` returns it for `count` images before an attack, and each
    evaluation takes it and returns the next. An attack that drops images takes the same rows of every array in it.
    """

    def start(self, count: int, /) -> State: ...

    def step(self, x: Array, y: Array, state: State, /) -> tuple[Gradient, State]: ...
