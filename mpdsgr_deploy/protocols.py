"""What a model can be asked, whatever runs it: answers (Predictor), gradients too (Differentiable), or gradients
through surrogates whose widths the attacker chooses (Adaptive).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any  # a numpy array or a torch tensor: whatever goes in comes out


class Predictor(Protocol):
    """Images float32 [B, C, H, W] in [0, 1] to freshly allocated float32 logits [B, K]."""

    def __call__(self, x: NDArray[np.float32], /) -> NDArray[np.float32]: ...


class Gradient(NamedTuple):
    """At a batch of images: logits [B, K], the loss of each sample [B], and d loss / d x [B, C, H, W]."""

    logits: Array
    loss: Array
    gradient: Array


class Differentiable(Protocol):
    """Images x [B, C, H, W] and classes y [B] to a `Gradient`; each sample's gradient is of its own loss."""

    def __call__(self, x: Array, y: Array, /) -> Gradient: ...


class Adaptive(Protocol):
    """A Differentiable whose surrogates have a width for each neuron, time step and image.

    widths: for each layer of neurons, in the order of the forward pass, half-widths g > 0 [B, T, ...] of the triangle
    max(0, g - |v|) / g^2 with v = U - V_th; None: 1 everywhere. Beside the gradient come the distances |v|, arrays of
    the same shapes: what the next widths are made of.
    """

    def __call__(self, x: Array, y: Array, widths: Sequence[Array] | None, /) -> tuple[Gradient, list[Array]]: ...
