"""Conditions that follow a gradient, each registered under the name that tiers use."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.carlini_wagner import cw_l2
from mpdsgr_deploy.attacks.condition import (
    Attacked,
    Batch,
    Condition,
    Floats,
    Generators,
    Kind,
    Network,
    register,
    starts,
)
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.pgd import Draw, Keep, bim, fgsm, pgd
from mpdsgr_deploy.attacks.sa_pgd import sa_pgd
from mpdsgr_deploy.protocols import Differentiable
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.surrogates import ADAPTIVE, with_resets

KEPT: dict[Keep, str] = {"broken": "broken by any iterate", "worst": "the iterate of the largest loss"}
ADAPTING = 32  # images attacked at once, since an adaptive surrogate stores two numbers per neuron, step and image


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Condition):
    """An attack that follows a gradient; subclasses implement how it raises the loss."""

    kind: ClassVar[Kind] = "gradient"

    @property
    def cost(self) -> int:
        return (self.steps + 1) * self.restarts * self.draws

    @property
    def through(self) -> str:
        """The surrogate, described in words."""
        return f"through {self.surrogate}"

    def target(self, network: Network) -> AbstractContextManager[Any]:
        return network.attacker(str(self.surrogate), loss=self.loss, draws=self.draws)

    def attack(self, target: Any, batch: Batch, generators: Generators) -> Attacked:
        counts = GradientCounts()
        images = self.climb(self.counted(target, counts), batch, starts(generators))
        return Attacked(images, *(count * self.draws for count in astuple(counts)))

    def counted(self, target: Any, counts: GradientCounts) -> Any:
        """Return what `target` returned, with the gradients in it counted."""
        return CountedGradients(target, counts)

    @abstractmethod
    def climb(self, target: Any, batch: Batch, draw: Draw) -> Floats:
        """Raise the loss of the `counted` target for a batch and return attacked images. draw: of random starts."""

    @property
    def kept(self) -> Literal["broken", "worst"]:
        """Which iterate to keep in an attack that cannot keep the last one: "worst" if asked for, else "broken"."""
        return "worst" if self.keep == "worst" else "broken"


@register
@dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    """One step of size eps (Goodfellow et al., arXiv 1412.6572)."""

    method: ClassVar[str] = "fgsm"

    @property
    def settings(self) -> str:
        return f"eps {self.eps:.4g}, {self.through}"

    @property
    def cost(self) -> int:
        return self.draws

    def climb(self, target: Differentiable, batch: Batch, draw: Draw) -> Floats:
        return fgsm(target, batch.x, batch.y, eps=self.bound)


@register
@dataclass(frozen=True, kw_only=True)
class PaperPGD(GradientAttack):
    """PGD as papers report it: few steps of a fixed size, evaluated at the last iterate."""

    method: ClassVar[str] = "pgd"

    step: float
    random_start: bool = True

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "steps": attack.steps, "step": attack.step}

    @property
    def settings(self) -> str:
        start = ", random start" if self.random_start else ""
        return f"eps {self.eps:.4g}, {self.steps} steps of {self.step:.4g}{start}, last iterate, {self.through}"

    @property
    def cost(self) -> int:
        return self.steps * self.draws

    def climb(self, target: Differentiable, batch: Batch, draw: Draw) -> Floats:
        if not self.random_start:
            return bim(target, batch.x, batch.y, eps=self.bound, step=self.step, steps=self.steps)
        return pgd(target, batch.x, batch.y, eps=self.bound, step=self.step, steps=self.steps, draw=draw)


@register
@dataclass(frozen=True, kw_only=True)
class Transfer(PaperPGD):
    """`PaperPGD` on another network, whose attacked images are tested on the network under evaluation."""

    method: ClassVar[str] = "transfer"
    kind: ClassVar[Kind] = "transfer"


@register
@dataclass(frozen=True, kw_only=True)
class StrongPGD(GradientAttack):
    """PGD with steps of eps/4, in which an image is broken if any iterate fools the network."""

    method: ClassVar[str] = "strong-pgd"

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "steps": attack.strong_steps}

    @property
    def settings(self) -> str:
        start_text = "random start" if self.restarts == 1 else f"{self.restarts} random starts"
        return f"eps {self.eps:.4g}, {self.steps} steps of eps/4, {start_text}, {KEPT[self.keep]}, {self.through}"

    def climb(self, target: Differentiable, batch: Batch, draw: Draw) -> Floats:
        return pgd(
            target,
            batch.x,
            batch.y,
            eps=self.bound,
            step=self.bound / 4,
            steps=self.steps,
            draw=draw,
            keep=self.keep,
            restarts=self.restarts,
        )


@dataclass(frozen=True, kw_only=True)
class OtherResetsPGD(StrongPGD):
    """Strong PGD through the same surrogate; subclasses choose attached or detached resets, whichever training used."""

    detached: ClassVar[bool]

    @property
    def through(self) -> str:
        name = with_resets(str(self.surrogate), detached=False)
        return f"through {name} with {'detached' if self.detached else 'attached'} resets"

    def target(self, network: Network) -> AbstractContextManager[Any]:
        name = with_resets(str(self.surrogate), detached=self.detached)
        return network.attacker(name, loss=self.loss, draws=self.draws)


@register
@dataclass(frozen=True, kw_only=True)
class DetachedPGD(OtherResetsPGD):
    """Strong PGD whose gradient does not pass through resets, as in libraries that detach them."""

    method: ClassVar[str] = "strong-pgd-detached"
    detached: ClassVar[bool] = True


@register
@dataclass(frozen=True, kw_only=True)
class AttachedPGD(OtherResetsPGD):
    """Strong PGD whose gradient passes through resets, for networks trained with detached resets."""

    method: ClassVar[str] = "strong-pgd-attached"
    detached: ClassVar[bool] = False


@register
@dataclass(frozen=True, kw_only=True)
class AutoPGD(GradientAttack):
    """APGD: PGD with a step size per image, which halves when the loss stops rising."""

    method: ClassVar[str] = "apgd"

    @property
    def settings(self) -> str:
        loss = self.loss.upper()
        return f"eps {self.eps:.4g}, {self.steps} steps of adaptive size on the {loss} loss, {self.through}"

    def climb(self, target: Differentiable, batch: Batch, draw: Draw) -> Floats:
        return apgd(target, batch.x, batch.y, eps=self.bound, steps=self.steps, draw=draw, keep=self.kept)


@register
@dataclass(frozen=True, kw_only=True)
class AdaptivePGD(GradientAttack):
    """SA-PGD through surrogates whose width follows each neuron's membrane potentials (ASSG)."""

    method: ClassVar[str] = "sa-pgd"

    surrogate: str | None = ADAPTIVE

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "steps": attack.strong_steps, "surrogate": ADAPTIVE}

    @property
    def settings(self) -> str:
        return f"SA-PGD, eps {self.eps:.4g}, {self.steps} steps, surrogates as wide as each neuron's potentials spread"

    @property
    def cost(self) -> int:
        return self.steps + 1

    def target(self, network: Network) -> AbstractContextManager[Any]:
        return network.adaptive(draws=self.draws)

    def attack(self, target: Any, batch: Batch, generators: Generators) -> Attacked:
        cuts = [slice(start, start + ADAPTING) for start in range(0, len(batch.y), ADAPTING)]
        parts = [super(AdaptivePGD, self).attack(target, batch.rows(cut), generators[cut]) for cut in cuts]
        counts = [sum(count) for count in zip(*(part[1:] for part in parts), strict=True)]
        return Attacked(np.concatenate([part.images for part in parts]), *counts)

    def climb(self, target: CountedGradients, batch: Batch, draw: Draw) -> Floats:
        return sa_pgd(target, batch.x, batch.y, eps=self.bound, steps=self.steps, draw=draw, keep=self.kept)


@register
@dataclass(frozen=True, kw_only=True)
class CarliniWagner(GradientAttack):
    """CW-L2: an image is broken if an image within the L2 distance `radius` fools the network."""

    method: ClassVar[str] = "cw-l2"

    radius: float
    searches: int = 5
    steps: int = 100
    loss: str = "margin"

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": None, "radius": attack.l2}

    @property
    def settings(self) -> str:
        return f"CW-L2 within an L2 distance of {self.radius:.4g}, {self.through}"

    @property
    def cost(self) -> int:
        return self.steps * self.searches * self.draws

    def climb(self, target: Differentiable, batch: Batch, draw: Draw) -> Floats:
        nearest = cw_l2(target, batch.x, batch.y, steps=self.steps, searches=self.searches)
        within = np.sqrt(((nearest - batch.x) ** 2).sum((1, 2, 3), keepdims=True)) <= self.radius
        return np.where(within, nearest, batch.x)
