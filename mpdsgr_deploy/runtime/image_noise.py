"""The noise of a stochastic network as a function of the image, so that its predictor stays a function.

    k = blake2b(image's float32 bytes; key: seed)      w = Philox(key: blake2b(input's name; key: k)), 32-bit words
    uniform  u = floor(w / 2^8) / 2^24
    normal   Box-Muller of the words w, w' of a pair: sqrt(-2 ln a) (cos b, sin b),
             a = (w + 1/2) / 2^32, b = 2 pi w' / 2^32

An image therefore gets the same noise in every batch and position, on every backend and machine, and any change of a
pixel draws new noise. Only the raw words of numpy's Philox are used, because numpy never changes this stream (NEP 19),
while a Generator's distributions may change with its version. Uniform draws are exact. Normal draws are computed in
float64 without rejections, so that another machine's logarithm changes one draw by at most a rounding, and no later
draw. A CPU core makes a uniform draw in about 6 ns and a normal one in 40 ns: 0.15 and 1 ms for T = 8 steps of a
3x32x32 image.

The seed is the defender's secret. An attacker who knows it knows the noise of every image and attacks a deterministic
network. Evaluations assume an attacker who does not know it and averages over other draws (expectation over
transformation, EOT). Because the noise depends only on the image, an image that fooled the network once always does,
and an attacker with many queries may find one among near copies.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from math import prod

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import NoiseInput
from mpdsgr_deploy.errors import InputError


class NoiseSource:
    """Maps images float32 [B, C, H, W] to the network's noise inputs: {input name: float32 [B, *shape]}.

    inputs: the noise entries of a manifest; without any, the network is deterministic and the result is empty. seed: 0
    to 2^64 - 1. Raises InputError for another seed.
    """

    def __init__(self, inputs: Sequence[NoiseInput] = (), seed: int = 0) -> None:
        self._inputs = tuple(inputs)
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Draw the noise of another seed from now on. Raises InputError for a seed outside 0 to 2^64 - 1."""
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed of the noise must be between 0 and 2^64 - 1, not {seed}")
        self._key = seed.to_bytes(8, "little")

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._inputs]

    def require(self, required: Mapping[str, Sequence[object]], network: object) -> None:
        """Raise InputError unless this source supplies exactly the inputs `required`.

        required: the shape of each input without the batch, by name. network: its name in the message.
        """
        own_shapes = {entry.name: entry.shape for entry in self._inputs}
        if {name: tuple(shape) for name, shape in required.items()} != own_shapes:
            raise InputError(
                f"{network} takes the noise {_listed(required)}, but gets {_listed(own_shapes)}; export again"
            )

    def __call__(self, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        draws = {entry.name: np.empty((len(x), *entry.shape), np.float32) for entry in self._inputs}
        if not draws:
            return draws
        for i, image in enumerate(x):
            content = (image + 0).astype("<f4").tobytes()  # + 0: -0 is the same pixel as 0
            key = blake2b(content, key=self._key, digest_size=32).digest()
            for entry in self._inputs:
                input_key = blake2b(entry.name.encode(), key=key, digest_size=16).digest()
                draws[entry.name][i] = DISTRIBUTIONS[entry.kind](input_key, entry.shape)
        return draws


def uniform(key: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return draws of U[0, 1) in multiples of 2^-24; key: 16 bytes."""
    high = _pairs(key, shape) >> 8
    return _shaped(high.astype(np.float32) * np.float32(2**-24), shape)


def normal(key: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return draws of N(0, 1), at most 6.8 in size because there are 2^32 possible radii; key: 16 bytes."""
    radius, angle = _pairs(key, shape).astype(np.float64).T / 2**32
    radius = np.sqrt(-2 * np.log(radius + 2**-33))
    angle *= 2 * np.pi
    return _shaped(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32), shape)


DISTRIBUTIONS = {"uniform": uniform, "normal": normal}


def _pairs(key: bytes, shape: tuple[int, ...]) -> NDArray[np.uint32]:
    """Return as many pairs of random words [n, 2] as are needed to fill `shape`."""
    count = (prod(shape) + 1) // 2
    raw = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(count)
    return raw.astype("<u8").view("<u4").reshape(count, 2)


def _shaped(pairs: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return pairs.ravel()[: prod(shape)].reshape(shape)


def _listed(inputs: Mapping[str, Sequence[object]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items()) or "none"
