"""Input encodings against their definitions: statistics, spectra, gradients, seeds."""

import pytest
import torch
from conftest import small_recipe
from scipy.stats import binom, kstest
from torch import Tensor

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.snn.encoding import (
    Encoding,
    Frames,
    Frequency,
    Poisson,
    RandomizedSmoothing,
    StochasticQuantization,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalize(x: Tensor) -> Tensor:
    return 4 * x - 1


def refuse(x: Tensor) -> Tensor:
    raise AssertionError("this encoding takes the image as it is")


@pytest.mark.parametrize("encoding", [Poisson(3, 2), StochasticQuantization(3, 2, 3), RandomizedSmoothing(3, 2, 0.5)])
def test_stochastic_encodings_repeat_with_the_seed_and_are_fresh_for_every_step_and_image(encoding: Encoding) -> None:
    x = torch.full((2, 2, 8, 8), 0.5)
    first = encoding(x, lambda x: x, seeded(0))
    assert encoding.stochastic
    assert first.shape == (3, 2, 2, 8, 8)
    assert torch.equal(encoding(x, lambda x: x, seeded(0)), first)
    assert not torch.equal(encoding(x, lambda x: x, seeded(1)), first)
    draws = first.flatten(0, 1).flatten(1)  # of each step and image
    assert len(draws.unique(dim=0)) == 6
    correlation = torch.corrcoef(draws)[~torch.eye(6, dtype=torch.bool)]
    assert correlation.abs().max() < 0.4  # 128 independent pixels: standard deviation 0.09


def test_poisson_rates_are_the_pixels_of_the_image_itself() -> None:
    pixels = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
    T = 20_000
    spikes = Poisson(T, 1)(pixels.view(1, 1, 1, 6), refuse, seeded(0))
    assert set(spikes.unique().tolist()) == {0, 1}
    for pixel, count in zip(pixels.tolist(), spikes.sum(0).flatten().tolist(), strict=True):
        low, high = binom.interval(0.9999, T, pixel)
        assert low <= count <= high


@pytest.mark.parametrize("encoding", [Poisson(5, 1), StochasticQuantization(5, 1, 3)])
def test_the_gradient_of_random_rounding_is_the_identity_at_every_step(encoding: Encoding) -> None:
    x = torch.rand(2, 1, 3, 3, generator=seeded(0)).requires_grad_()
    weights = torch.randn(5, 2, 1, 3, 3, generator=seeded(1))
    (encoding(x, refuse, seeded(2)) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(0))


def test_one_level_of_quantisation_is_poisson_encoding_draw_by_draw() -> None:
    x = torch.rand(3, 2, 4, 4, generator=seeded(0))
    quantised = StochasticQuantization(7, 2, 1)(x, refuse, seeded(1))
    assert torch.equal(quantised, Poisson(7, 2)(x, refuse, seeded(1)))


@pytest.mark.parametrize("levels", [2, 5])
def test_pixels_are_rounded_to_their_neighbours_with_the_pixel_as_mean(levels: int) -> None:
    pixels = torch.tensor([0.0, 0.07, 0.31, 0.5, 0.96, 1.0])
    T = 20_000
    rounded = StochasticQuantization(T, 1, levels)(pixels.view(1, 1, 1, 6), refuse, seeded(0)).flatten(1)
    for pixel, values in zip(pixels.tolist(), rounded.T, strict=True):
        below, share = divmod(pixel * levels, 1)
        steps = (values * levels).round()
        torch.testing.assert_close(values * levels, steps)
        assert set(steps.tolist()) <= {below, below + 1}
        low, high = binom.interval(0.9999, T, share)
        assert low <= (steps == below + 1).sum() <= high + 1  # a draw of exactly 0 rounds up


def test_rsc_adds_gaussian_noise_before_the_normalisation() -> None:
    x = torch.tensor([0.2, 0.9]).view(1, 2, 1, 1).expand(4, 2, 32, 32)
    encoded = RandomizedSmoothing(3, 2, 0.25)(x, normalize, seeded(0))
    noise = ((encoded + 1) / 4 - x) / 0.25  # of the pixels, had they not been normalised afterwards
    count = noise.numel()
    assert abs(noise.mean().item()) < 4 / count**0.5
    assert abs(noise.std().item() - 1) < 4 / (2 * count) ** 0.5
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert noise.abs().max() > 2  # pixels beyond [0, 1] are not clipped


def test_rsc_without_noise_is_the_normalised_image() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(RandomizedSmoothing(2, 3, 0.0)(x, normalize, seeded(0)), torch.stack([normalize(x)] * 2))


@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
def test_frequency_keeps_exactly_the_named_frequencies(size: tuple[int, int]) -> None:
    radii = [5, 3, 2, 1]
    x = torch.rand(2, 3, *size, generator=seeded(0), dtype=torch.float64)
    encoded = Frequency(3, size, radii).double()(x, normalize)
    before = torch.fft.fft2(normalize(x))
    rows, columns = (torch.fft.fftfreq(n, 1 / n).abs() for n in size)
    assert encoded.shape == (4, *x.shape)
    for step, radius in zip(encoded, radii, strict=True):
        inside = (rows[:, None] <= radius) & (columns <= radius)
        after = torch.fft.fft2(step)
        # the matrices are float32: 1e-7 of the spectrum's largest entries
        torch.testing.assert_close(after[..., inside], before[..., inside], rtol=0, atol=1e-4)
        assert inside.all() or after[..., ~inside].abs().max() < 1e-4


def test_frequency_radii_default_to_those_of_the_paper() -> None:
    recipe = small_recipe(encoding={"name": "frequency", "T": 8})
    encode = build_model(recipe, (3, 32, 32), 10).encode
    kept = torch.linalg.matrix_rank(encode.rows, tol=1e-3).tolist()  # a radius r below 16 keeps 2 r + 1 frequencies
    assert kept == [32, 29, 25, 21, 17, 13, 9, 5]


def test_frequency_needs_a_radius_for_every_step() -> None:
    recipe = small_recipe(encoding={"name": "frequency", "T": 3, "radii": [4, 2]})
    with pytest.raises(InputError, match=r"encoding\.radii has 2 values and encoding\.T is 3"):
        build_model(recipe, (1, 8, 8), 10)


def test_frames_are_the_channels_in_order_and_not_normalised() -> None:
    x = torch.arange(2 * 6.0).view(2, 6, 1, 1)
    encoded = Frames(3, 2)(x, refuse)
    assert encoded.flatten(2).tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_frames_must_divide_the_channels() -> None:
    with pytest.raises(InputError, match="divisor of 5, not 3"):
        build_model(small_recipe(encoding={"name": "frames", "T": 3}), (5, 8, 8), 10)
