"""The conditions of an evaluation: ways to turn clean images into attacked ones, described by their fields.

A condition is a frozen dataclass. Its class says how images are attacked and is registered under a name; its fields say
with which bound, surrogate, loss and effort. `attacks.conditions` holds the classes of this package, `attacks.tiers`
the lists that evaluations are made of.
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

# noise: random, no attack. gradient: follows the gradient of the network under test. transfer: images made on another
# network. query: asks the network under test, without its gradient.
Kind = Literal["noise", "gradient", "transfer", "query"]

CLEAN, GAUSSIAN, UNIFORM, FGSM, BIM, PGD, STRONG = "clean", "gaussian", "uniform", "fgsm", "bim", "pgd", "pgd-strong"
SA_PGD, APGD_CE, APGD_DLR, SQUARE, CW = "strong adaptive", "apgd-ce", "apgd-dlr", "square", "cw-l2"
APGD_T, FAB_T, MPD_APGD, TRANSFER, WORST = "apgd-t", "fab-t", "mpd-apgd", "transfer", "worst"


class Network(Protocol):
    """A network under attack: a Predictor that can be differentiated as its attackers please.

    `stochastic`: it draws noise, and gradients are averages over `draws` of it. What `attacker` and `adaptive` return
    can be used inside the with block that opens it. loss: "ce", "dlr" or "margin"; or "weighted", where calls take
    weights [B, K] in the place of classes and the loss is weights . logits.
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
    """Attacked images [B, C, H, W], and what they cost together: gradients of images, or queries of a black-box attack.

    zero and not_finite count the gradients that were no use to the attack.
    """

    images: Floats
    evaluations: int = 0
    zero: int = 0
    not_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class Condition(ABC):
    """One condition of an evaluation, complete: two with equal fields attack the same images in the same way.

    eps: the L-infinity bound, None where there is none. surrogate: through which a network is differentiated, None
    where it is not. restarts: random starts. rank: place in the order in which accuracy must not rise (check 2), None
    for conditions outside it. draws: over how many draws of its noise a stochastic network's gradient is averaged.
    keep: as of `pgd`. seed, stream (default: the name): what random numbers depend on beside the image's place. sender:
    the other network on which a transferred attack is made, by the name that the suite has for it.
    """

    method: ClassVar[str]  # the name it is registered under
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
        """The fields that the recipe sets where a tier does not."""
        return {"eps": attack.eps}

    @property
    def bound(self) -> float:
        """The eps of a condition that has one."""
        assert self.eps is not None, f"{self.name} has no eps"
        return self.eps

    @property
    @abstractmethod
    def settings(self) -> str:
        """Describe the attack's strength for people. It is derived from the fields: equal text means equal strength."""

    @property
    def swept(self) -> bool:
        """Whether it is a strong white-box attack, of which there is one per surrogate."""
        return self.kind == "gradient" and self.method in ("strong-pgd", "sa-pgd")

    @property
    def cost(self) -> int:
        """Gradients per image at most, as an estimate of its time; three queries count as one."""
        return 0

    @abstractmethod
    def target(self, network: Network) -> AbstractContextManager[Any]:
        """What the attack asks: the network itself, or an attacker of it. Opened for a with block."""

    @abstractmethod
    def attack(self, target: Any, batch: Batch, generators: Generators) -> Attacked:
        """Attack a batch. All random numbers come from `generators`, each image's own."""

    def faults(self, clean: Floats, attacked: Floats) -> list[str]:
        """Return how attacked images [B, C, H, W] break rules of this attack other than eps and [0, 1]."""
        return []

    def generators(self, batch: Batch) -> Generators:
        """Make generators that depend on the seed, the condition's stream and the place of each image alone."""
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
    """U(-1, 1) per pixel, drawn from each image's own generator, as `pgd` asks for random starts."""
    return lambda shape: np.stack([rng.uniform(-1, 1, shape[1:]) for rng in generators]).astype(np.float32)
