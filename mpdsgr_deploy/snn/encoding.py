"""Input encodings: from images [B, C, H, W] in [0, 1] to the inputs of T time steps, [T, B, C', H, W].

An encoding is a module without parameters, called as `encode(x, normalize, noise)`. It decides whether and where the
network's normalisation is applied. Stochastic encodings draw new numbers from `noise` for every step.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mpdsgr_deploy.snn.draws import Noise, normal, uniform

Normalize = Callable[[Tensor], Tensor]


class Encoding(nn.Module):
    """The base of all encodings. T: number of time steps; channels: number of channels C' of each step."""

    stochastic: ClassVar[bool] = False

    def __init__(self, T: int, channels: int) -> None:
        super().__init__()
        self.T, self.channels = T, channels

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        raise NotImplementedError


class Direct(Encoding):
    """Direct encoding: the normalised image at every step.

    It is stacked instead of expanded, so that the exported graph needs no shape arithmetic.
    """

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return torch.stack([normalize(x)] * self.T)


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """Return `rounded`, the rounded values of x, with the gradient of x."""
    if not torch.is_grad_enabled():  # the ONNX exporter traces this path
        return rounded
    return rounded + (x - x.detach())  # plus 0 in the forward pass, whose gradient is the identity


class Poisson(Encoding):
    """Poisson encoding: spikes [x >= U(0, 1)] of the image without normalisation; a straight-through gradient."""

    stochastic = True

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return straight_through((x >= uniform(self.T, x, noise)).to(x.dtype), x)


class StochasticQuantization(Encoding):
    """Stochastic quantisation encoding (SQE): the image, without normalisation, rounded to multiples of 1 / levels.

    Pixels are rounded up or down at random, so that their mean is the image: a pixel becomes n / levels, where n is the
    number of k in 0..levels - 1 with x >= (k + U(0, 1)) / levels. One level equals Poisson encoding, with the same
    draws; with more levels, the variance of at most 1 / (4 levels^2) goes to 0. The gradient is straight-through.
    Source: Liu et al., arXiv 2610.01558.
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
    """Randomised smoothing coding (RSC, arXiv 2407.20099): x + N(0, std^2), normalised; std in pixel units."""

    stochastic = True

    def __init__(self, T: int, channels: int, std: float) -> None:
        super().__init__(T, channels)
        self.std = std

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return normalize(x + self.std * normal(self.T, x, noise))


class Frequency(Encoding):
    """FEEL's frequency encoding (Xu et al., NeurIPS 2024): step t gets the image's frequencies up to `radii[t]`.

    The low-pass keeps a centred box of the image's discrete Fourier transform, |k| <= radius in both directions. This
    filter is separable and real, so it is applied as one matrix on rows and one on columns.
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
        with torch.autocast(device, enabled=False):  # a projection in lower precision would let other frequencies pass
            return torch.stack([self.rows[t] @ image @ self.columns[t] for t in range(self.T)])


def low_pass(size: int, radius: int) -> Tensor:
    """Return the symmetric projection [size, size] of signals that keeps their frequencies |k| <= radius."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    return torch.fft.ifft(torch.fft.fft(identity) * (k.abs() <= radius)).real.float()


class Frames(Encoding):
    """Event data: the T * C' channels of an image are T frames of C' channels, used without normalisation."""

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return x.unflatten(1, (self.T, self.channels)).transpose(0, 1)
