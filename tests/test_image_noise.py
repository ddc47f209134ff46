"""The noise that an image gets: a function of its pixels, of the seed and of the input's name, the same everywhere."""

import math
import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest
from stochastic_networks import images

from mpdsgr_deploy.bundle import NoiseInput
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime import NoiseSource
from mpdsgr_deploy.runtime.image_noise import normal, uniform
from mpdsgr_deploy.snn.draws import in_turn
from mpdsgr_deploy.snn.encoding import Poisson

PAIR = (NoiseInput(name="a", kind="uniform", shape=(3, 5)), NoiseInput(name="b", kind="normal", shape=(3, 5)))


def test_poisson_fed_from_outside_fires_at_the_rate_of_the_pixels() -> None:
    pixels, T = np.array([0.0, 0.05, 0.3, 0.5, 0.95, 1.0], np.float32), 20_000
    x = pixels.reshape(1, 1, 1, 6)
    noise = NoiseSource([NoiseInput(name="u", kind="uniform", shape=(T, 1, 1, 6))])(x)
    spikes = Poisson(T, 1)(torch.from_numpy(x), lambda x: x, in_turn([torch.from_numpy(noise["u"])]))
    for pixel, count in zip(pixels.tolist(), spikes.sum(0).flatten().tolist(), strict=True):
        low, high = binom.interval(0.9999, T, pixel)
        assert low <= count <= high


def test_draws_are_handed_out_in_turn_time_first() -> None:
    first, second = torch.rand(2, 3, 5), torch.rand(2, 4, 5)
    draw, x = in_turn([first, second]), torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(draw("uniform", 3, x), first.double().transpose(0, 1))
    assert torch.equal(draw("normal", 4, x), second.double().transpose(0, 1))
    with pytest.raises(InputError, match="more often than 2 times"):
        draw("uniform", 3, x)


def test_noise_belongs_to_the_image_not_to_its_batch() -> None:
    source, x = NoiseSource(PAIR, seed=1), images(5)
    whole = source(x)
    assert {name: draw.shape for name, draw in whole.items()} == {"a": (5, 3, 5), "b": (5, 3, 5)}
    shuffled = source(x[[4, 0, 4]])
    for name, draw in whole.items():
        assert draw.dtype == np.float32
        assert np.array_equal(shuffled[name], draw[[4, 0, 4]])
        assert len(np.unique(draw)) == draw.size  # no image, step or neuron shares a draw
    x[0, 0, 0, 0] = 0.0
    zero, negative = source(x), source(np.where(x == 0, np.float32(-0.0), x))
    assert np.array_equal(zero["a"], negative["a"])


def test_another_seed_pixel_or_input_is_other_noise() -> None:
    x = images(2)
    moved = x.copy()
    moved[1, 0, 3, 3] = np.nextafter(moved[1, 0, 3, 3], np.float32(0))
    first, other, near = NoiseSource(PAIR, seed=1)(x), NoiseSource(PAIR, seed=2)(x), NoiseSource(PAIR, seed=1)(moved)
    renamed = NoiseSource([PAIR[0].model_copy(update={"name": "c"})], seed=1)(x)
    assert not np.isin(first["a"], other["a"]).any()
    assert np.array_equal(near["a"][0], first["a"][0])
    assert not np.isin(first["a"][1], near["a"][1]).any()
    assert not np.isin(first["a"], renamed["c"]).any()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range(seed: int) -> None:
    with pytest.raises(InputError, match="between 0 and 2\\^64 - 1"):
        NoiseSource(PAIR, seed)


def test_the_statistics_of_the_draws() -> None:
    count = 100_001  # odd: words come in pairs
    u, n = (draw(bytes(range(16)), (count,)).astype(np.float64) for draw in (uniform, normal))
    assert 0 <= u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
    for draws, mean, variance, fourth, law in ((u, 0.5, 1 / 12, 1 / 80, "uniform"), (n, 0, 1, 3, "norm")):
        assert abs(draws.mean() - mean) < 4 * (variance / count) ** 0.5
        assert abs(draws.var() - variance) < 4 * ((fourth - variance**2) / count) ** 0.5
        assert kstest(draws, law).pvalue > 0.01
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / count**0.5  # also between the two of a pair


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011): four 64-bit words of a key and a counter below 2^64."""
    mask = 2**64 - 1
    x, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(second >> 64) ^ x[1] ^ k0, second & mask, (first >> 64) ^ x[3] ^ k1, first & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x


def test_the_draws_by_hand() -> None:
    """From the definition in plain integers, so that no numpy may change a bundle's noise unnoticed."""
    x = images(1)
    found = NoiseSource(PAIR, seed=5)(x)
    image = blake2b(x.tobytes(), key=(5).to_bytes(8, "little"), digest_size=32).digest()
    words = {}
    for name in "ab":
        key = blake2b(name.encode(), key=image, digest_size=16).digest()
        halves = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        blocks = [word for counter in (1, 2) for word in philox(halves, counter)]  # numpy counts before it draws
        words[name] = [half for word in blocks for half in (word & 0xFFFFFFFF, word >> 32)]
    assert found["a"].ravel().tolist() == [(word >> 8) / 2**24 for word in words["a"][:15]]
    expected: list[float] = []
    for a, b in zip(words["b"][::2], words["b"][1::2], strict=True):
        radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
        expected += [radius * math.cos(2 * math.pi * b / 2**32), radius * math.sin(2 * math.pi * b / 2**32)]
    np.testing.assert_allclose(found["b"].ravel(), expected[:15], rtol=2e-7)


def test_a_fresh_process_without_torch_makes_the_same_noise() -> None:
    script = (
        "import sys, numpy as np; from mpdsgr_deploy.bundle import NoiseInput; "
        "from mpdsgr_deploy.runtime.image_noise import NoiseSource; "
        "source = NoiseSource([NoiseInput(name='a', kind='normal', shape=(4,))], 9); "
        "print(source(np.full((1, 1, 2, 2), 0.5, np.float32))['a'].tobytes().hex(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    source = NoiseSource([NoiseInput(name="a", kind="normal", shape=(4,))], 9)
    here = source(np.full((1, 1, 2, 2), 0.5, np.float32))["a"]
    assert done.stdout.split() == [here.tobytes().hex(), "False"]
