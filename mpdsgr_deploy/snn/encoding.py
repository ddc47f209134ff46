"""Input encodings: images [B, C, H, W] in [0, 1] to what T time steps see, [T, B, C', H, W].

An encoding is a module without parameters, `encode(x, normalize, noise)`; it decides where the network's own
normalisation enters. `stochastic` ones draw from `noise`, fresh for every step.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mpdsgr_deploy.snn.draws import Noise, normal, uniform

Normalize = Callable[[Tensor], Tensor]


class Encoding(nn.Module):
    """The base of all encodings: T steps, and how many channels C' each has."""

    stochastic: ClassVar[bool] = False

    def __init__(self, T: int, channels: int) -> None:
        super().__init__()
        self.T, self.channels = T, channels

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        raise NotImplementedError


class Direct(Encoding):
    """The normalised image itself at every step. Stacked, not expanded: exported, that is free of shape arithmetic."""

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return torch.stack([normalize(x)] * self.T)


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """Return the rounded values of x with the gradient of x itself."""
    if not torch.is_grad_enabled():  # also the path that the ONNX exporter traces
        return rounded
    return rounded + (x - x.detach())  # the second term is zero forward, the identity backward


class Poisson(Encoding):
    """Spikes [x >= U(0, 1)] of the image itself, not normalised; the gradient passes straight through."""

    stochastic = True

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return straight_through((x >= uniform(self.T, x, noise)).to(x.dtype), x)


class StochasticQuantization(Encoding):
    """Stochastic quantisation encoding (SQE, Liu et al., arXiv 2610.01558): the image rounded to multiples of 1/levels.

    Up or down at random, such that the mean is the image, which is not normalised. Of the values k / levels as many are
    added as there are k with x >= (k + U(0, 1)) / levels. One level is Poisson encoding, draw by draw; with more the
    variance, at most 1 / (4 levels^2), goes to 0. The gradient passes straight through.
    """

    stochastic = True

    def __init__(self, T: int, channels: int, levels: int) -> None:
        super().__init__(T, channels)
        self.levels = levels

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        draw = uniform(self.T, x, noise)
        reached = torch.stack([(x >= (draw + k) / self.levels).to(x.dtype) for k in range(self.levels)])
        return straight_through(reached.mean(0), x)


class RandomizedSmoothing(Encoding):
    """Randomised smoothing coding (RSC, arXiv 2407.20099): x + N(0, std^2), then normalised. std in pixel units."""

    stochastic = True

    def __init__(self, T: int, channels: int, std: float) -> None:
        super().__init__(T, channels)
        self.std = std

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return normalize(x + self.std * normal(self.T, x, noise))


class Frequency(Encoding):
    """FEEL's frequency encoding (Xu et al., NeurIPS 2024): step t sees the image's frequencies up to `radii[t]`.

    The low-pass is a centred box in the image's discrete Fourier transform, |k| <= radius in both directions. Such a
    box is separable and real, so it is applied as a matrix on rows and on columns.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, channels: int, size: tuple[int, int], radii: Sequence[int]) -> None:
        super().__init__(len(radii), channels)
        height, width = size
        self.register_buffer("rows", torch.stack([low_pass(height, r) for r in radii]), persistent=False)
        self.register_buffer("columns", torch.stack([low_pass(width, r) for r in radii]), persistent=False)

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        image = normalize(x)
        device = "cpu" if x.is_meta else x.device.type  # autocast does not support the meta device
        with torch.autocast(device, enabled=False):  # a rounded projection would pass other frequencies
            return torch.stack([self.rows[t] @ image @ self.columns[t] for t in range(self.T)])


def low_pass(size: int, radius: int) -> Tensor:
    """The symmetric projection [size, size] that keeps the frequencies |k| <= radius of a signal of that length."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    return torch.fft.ifft(torch.fft.fft(identity) * (k.abs() <= radius)).real.float()


class Frames(Encoding):
    """Event data: the T * C' channels of an image are T frames of C' channels, as they are."""

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return x.unflatten(1, (self.T, self.channels)).transpose(0, 1)
