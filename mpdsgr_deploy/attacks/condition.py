"""The conditions of an evaluation: each is one way to turn clean images into attacked images.

A condition is a frozen dataclass. Its class implements the attack and is registered under a name; its fields set the
bound, the surrogate, the loss and the number of steps. `attacks.conditions` and the other modules whose names end in
conditions hold the classes of this package; `attacks.tiers` lists the conditions of each evaluation.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.pgd import Draw, Keep
from mpdsgr_deploy.protocols import Adaptive, Differentiable
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.registry import Expected, Registry

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]
Generators = list[np.random.Generator]  # one per image of a batch

# noise: random changes. gradient: follows the gradient of the network under test. transfer: attacks another network and
# tests its images on this one. query: uses the logits of the network under test, without its gradient.
Kind = Literal["noise", "gradient", "transfer", "query"]

CLEAN, GAUSSIAN, UNIFORM, FGSM, BIM, PGD, STRONG = "clean", "gaussian", "uniform", "fgsm", "bim", "pgd", "pgd-strong"
SA_PGD, APGD_CE, APGD_DLR, SQUARE, CW = "strong adaptive", "apgd-ce", "apgd-dlr", "square", "cw-l2"
APGD_T, FAB_T, MPD_APGD, TRANSFER, WORST = "apgd-t", "fab-t", "mpd-apgd", "transfer", "worst"


class Network(Protocol):
    """A network under attack: a Predictor that attackers can differentiate through any surrogate and loss.

    stochastic: whether the network draws noise; gradients are then averages over `draws` evaluations. The objects that
    `attacker` and `adaptive` return are usable inside a with block that opens them. loss: "ce", "dlr" or "margin"; or
    "weighted", for which calls take weights [B, K] instead of classes, and the loss is weights . logits.
    """

    @property
    def stochastic(self) -> bool: ...

    def __call__(self, x: Floats, /) -> Floats: ...

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]: ...

    def adaptive(self, *, draws: int) -> AbstractContextManager[Adaptive]: ...


class Source(NamedTuple):
    """A network and the name of the surrogate it was trained with."""

    network: Network
    trained: str


class Batch(NamedTuple):
    """Images [B, C, H, W] in [0, 1], their classes [B] and their places in the test set [B]."""

    x: Floats
    y: Classes
    places: Classes

    def rows(self, chosen: slice | Classes) -> "Batch":
        """Return the part of the batch that `chosen` selects."""
        return Batch(self.x[chosen], self.y[chosen], self.places[chosen])


class Attacked(NamedTuple):
    """Attacked images [B, C, H, W], and the cost of the whole batch.

    evaluations: gradients, or queries of an attack without gradients, counted per image. zero and not_finite count the
    gradients that the attack could not use.
    """

    images: Floats
    evaluations: int = 0
    zero: int = 0
    not_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class Condition(ABC):
    """One condition of an evaluation. Two conditions with equal fields attack the same images in the same way.

    eps: the L-infinity bound, None if the attack has none. surrogate: the surrogate through which a network is
    differentiated, None for attacks without gradients. restarts: number of random starts. rank: position in the order
    of attack strength, in which accuracy must not rise (health check 2); None for conditions outside this order.
    draws: number of noise draws over which a stochastic network's gradient is averaged. keep: see `pgd`. seed, stream
    (default: the name): what random numbers depend on besides the image's place in the test set. sender: for a
    transferred attack, the suite's name of the other network on which the images are made.
    """

    method: ClassVar[str]  # the name under which the class is registered
    kind: ClassVar[Kind]

    name: str
    eps: float | None
    surrogate: str | None = None
    loss: str = "ce"
    steps: int = 1
    restarts: int = 1
    rank: int | None = None
    draws: int = 1
    keep: Keep = "broken"
    seed: int = 0
    stream: str = ""
    sender: str = ""

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        """Return the fields that the recipe sets unless a tier sets them."""
        return {"eps": attack.eps}

    @property
    def bound(self) -> float:
        """The L-infinity bound; only for conditions that have one."""
        assert self.eps is not None, f"{self.name} has no eps"
        return self.eps

    @property
    @abstractmethod
    def settings(self) -> str:
        """The attack's strength, in words. The text is derived from the fields, so equal text means equal strength."""

    @property
    def swept(self) -> bool:
        """Whether this is one of the strong white-box attacks that are repeated for every surrogate."""
        return self.kind == "gradient" and self.method in ("strong-pgd", "sa-pgd")

    @property
    def cost(self) -> int:
        """Upper bound on the gradients per image, which estimates run time; three queries count as one gradient."""
        return 0

    @abstractmethod
    def target(self, network: Network) -> AbstractContextManager[Any]:
        """Return a context manager that yields what `attack` evaluates: the network itself, or gradients of it."""

    @abstractmethod
    def attack(self, target: Any, batch: Batch, generators: Generators) -> Attacked:
        """Attack a batch. All random numbers of an image come from its own generator in `generators`."""

    def faults(self, clean: Floats, attacked: Floats) -> list[str]:
        """Return in which ways attacked images [B, C, H, W] violate rules of this attack, beyond eps and [0, 1]."""
        return []

    def generators(self, batch: Batch) -> Generators:
        """Return a random generator per image, which depends only on the seed, the stream and the image's place."""
        stream = (self.stream or self.name).encode()
        return [np.random.default_rng((self.seed, place, *stream)) for place in batch.places.tolist()]


CONDITIONS: Registry[type[Condition]] = Registry(
    "attack",
    "mpdsgr_deploy.attacks",
    expected=Expected(
        "a class derived from mpdsgr_deploy.attacks.condition.Condition",
        lambda entry: isinstance(entry, type) and issubclass(entry, Condition),
    ),
)

C = TypeVar("C", bound=type[Condition])


def register(condition: C) -> C:
    """Class decorator: make a condition available to tiers and recipes under its `method`."""
    CONDITIONS.add(condition.method, condition)
    return condition


def starts(generators: Generators) -> Draw:
    """Return a `pgd.Draw` of random starts: U(-1, 1) per pixel, from each image's own generator."""
    return lambda shape: np.stack([rng.uniform(-1, 1, shape[1:]) for rng in generators]).astype(np.float32)
