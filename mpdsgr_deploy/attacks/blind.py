"""Conditions that use no gradient: noise and the Square attack, each registered under the name that tiers use."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import Attacked, Batch, Condition, Floats, Generators, Kind, Network, register
from mpdsgr_deploy.attacks.square import square
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.recipe import Attack


def uniform(x: NDArray[np.float32], *, eps: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return x + U(-eps, eps) per pixel, clipped to [0, 1]; x [..., C, H, W] in [0, 1]."""
    return np.clip(x + rng.uniform(-eps, eps, x.shape).astype(np.float32), 0, 1)


def gaussian(x: NDArray[np.float32], *, std: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return x + N(0, std^2) per pixel, clipped to [0, 1]. The change has no L-infinity bound."""
    return np.clip(x + rng.normal(0, std, x.shape).astype(np.float32), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Noise(Condition):
    """Random perturbations; an attack that breaks fewer images than these is broken itself."""

    kind: ClassVar[Kind] = "noise"

    def target(self, network: Network) -> AbstractContextManager[None]:
        return nullcontext()

    def attack(self, target: Any, batch: Batch, generators: Generators) -> Attacked:
        pairs = zip(batch.x, generators, strict=True)
        return Attacked(np.stack([self.perturb(image, rng) for image, rng in pairs]))

    @abstractmethod
    def perturb(self, image: Floats, rng: np.random.Generator) -> Floats:
        """Return an image [C, H, W] with noise drawn from `rng`."""


@register
@dataclass(frozen=True, kw_only=True)
class Gaussian(Noise):
    """Normal noise, without an L-infinity bound."""

    method: ClassVar[str] = "gaussian"

    std: float

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": None, "std": attack.gaussian_std}

    @property
    def settings(self) -> str:
        return f"N(0, {self.std:.4g}^2)"

    def perturb(self, image: Floats, rng: np.random.Generator) -> Floats:
        return gaussian(image, std=self.std, rng=rng)


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(Noise):
    """Uniform noise in the L-infinity ball of radius eps."""

    method: ClassVar[str] = "uniform"

    @property
    def settings(self) -> str:
        return f"U(-{self.eps:.4g}, {self.eps:.4g})"

    def perturb(self, image: Floats, rng: np.random.Generator) -> Floats:
        return uniform(image, eps=self.bound, rng=rng)


@register
@dataclass(frozen=True, kw_only=True)
class Square(Condition):
    """Random search that uses only the network's logits."""

    method: ClassVar[str] = "square"
    kind: ClassVar[Kind] = "query"

    queries: int

    @property
    def settings(self) -> str:
        return f"eps {self.eps:.4g}, at most {self.queries} queries an image, no gradients"

    @property
    def cost(self) -> int:
        return self.queries // 3

    def target(self, network: Network) -> AbstractContextManager[Predictor]:
        return nullcontext(network)

    def attack(self, target: Predictor, batch: Batch, generators: Generators) -> Attacked:
        search = square(
            target, batch.x, batch.y, eps=self.bound, queries=self.queries, seed=self.seed, indices=batch.places
        )
        return Attacked(search.images, int(search.queries.sum()))
