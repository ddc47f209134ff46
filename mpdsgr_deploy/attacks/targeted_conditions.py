"""The targeted attacks of AutoAttack's standard version as conditions of evaluations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from mpdsgr_deploy.attacks.apgd import apgd_t
from mpdsgr_deploy.attacks.condition import Batch, Floats, Network, register
from mpdsgr_deploy.attacks.conditions import GradientAttack
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.fab import fab_t
from mpdsgr_deploy.attacks.pgd import Draw
from mpdsgr_deploy.attacks.targets import CLASSES_AIMED_AT
from mpdsgr_deploy.protocols import Predictor

Target = tuple[Predictor, Any]  # a network, and its gradients of weighted logits


@dataclass(frozen=True, kw_only=True)
class AimedAttack(GradientAttack):
    """An attack that aims at each of the likeliest wrong classes in turn."""

    loss: str = "weighted"
    steps: int = 100
    classes: int = CLASSES_AIMED_AT

    @property
    def cost(self) -> int:
        return (self.steps + 1) * self.classes * self.draws

    @contextmanager
    def target(self, network: Network) -> Iterator[Target]:
        with network.attacker(str(self.surrogate), loss=self.loss, draws=self.draws) as gradients:
            yield network, gradients

    def counted(self, target: Target, counts: GradientCounts) -> Target:
        network, gradients = target
        return network, CountedGradients(gradients, counts)


@register
@dataclass(frozen=True, kw_only=True)
class TargetedAutoPGD(AimedAttack):
    """APGD-T: APGD on the targeted DLR loss."""

    method: ClassVar[str] = "apgd-t"

    @property
    def settings(self) -> str:
        return (
            f"APGD-T, eps {self.eps:.4g}, {self.steps} steps of adaptive size on the targeted DLR loss at each of the "
            f"{self.classes} likeliest wrong classes, {self.through}"
        )

    def climb(self, target: Target, batch: Batch, draw: Draw) -> Floats:
        return apgd_t(
            *target,
            batch.x,
            batch.y,
            eps=self.bound,
            steps=self.steps,
            classes=self.classes,
            draw=draw,
            keep=self.kept,
        )


@register
@dataclass(frozen=True, kw_only=True)
class TargetedFAB(AimedAttack):
    """FAB-T, which searches the smallest change; an image is broken if that change is at most eps."""

    method: ClassVar[str] = "fab-t"

    @property
    def settings(self) -> str:
        return (
            f"FAB-T, smallest change within eps {self.eps:.4g}, {self.steps} steps from the clean image towards each "
            f"of the {self.classes} likeliest wrong classes, {self.through}"
        )

    def climb(self, target: Target, batch: Batch, draw: Draw) -> Floats:
        return fab_t(*target, batch.x, batch.y, eps=self.bound, steps=self.steps, classes=self.classes)
