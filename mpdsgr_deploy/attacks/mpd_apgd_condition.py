"""MPD-APGD as a condition of evaluations."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpdsgr_deploy.attacks.condition import Batch, Floats, Kind, Network, register
from mpdsgr_deploy.attacks.conditions import GradientAttack
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.mpd_apgd import QUICK, SCHEDULE, Round, Schedule, Through, gradients, mpd_apgd
from mpdsgr_deploy.attacks.pgd import Draw
from mpdsgr_deploy.protocols import Differentiable
from mpdsgr_deploy.recipe import Attack

HEAVY_TAILED = "superspike"  # 1 / (1 + k |U - V_th|)^2
TRANSFERRED: Schedule = (*QUICK, Round("apgd", Through(20), 1, near=0.25, aim=1))


@register
@dataclass(frozen=True, kw_only=True)
class MPDAutoPGD(GradientAttack):
    """`mpd_apgd` with a schedule: rounds of adaptive steps on images that are still classified correctly."""

    method: ClassVar[str] = "mpd-apgd"

    steps: int = 100
    schedule: Schedule = SCHEDULE

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "surrogate": HEAVY_TAILED}

    @property
    def settings(self) -> str:
        lengths = ", ".join(str(turn.length * self.steps) for turn in self.schedule)
        names = ", ".join(f"{k:g}" for k in sorted({turn.through.sharpness for turn in self.schedule}))
        losses = " and ".join(sorted({turn.through.loss.upper() for turn in self.schedule}))
        return (
            f"MPD-APGD, eps {self.eps:.4g}, rounds of {lengths} adaptive steps on the {losses} losses through "
            f"{self.surrogate} of sharpness {names}, the later ones on images that came near the boundary"
        )

    @property
    def cost(self) -> int:
        return gradients(self.steps, self.schedule) * self.draws

    @contextmanager
    def target(self, network: Network) -> Iterator[Mapping[Through, Differentiable]]:
        with ExitStack() as stack:
            yield {
                way: stack.enter_context(
                    network.attacker(f"{self.surrogate}:{way.sharpness:g}", loss=way.loss, draws=self.draws)
                )
                for way in dict.fromkeys(turn.through for turn in self.schedule)
            }

    def counted(
        self, target: Mapping[Through, Differentiable], counts: GradientCounts
    ) -> dict[Through, CountedGradients]:
        return {way: counts.of(one) for way, one in target.items()}

    def climb(self, target: Mapping[Through, CountedGradients], batch: Batch, draw: Draw) -> Floats:
        adversarial = mpd_apgd(
            target,
            batch.x,
            batch.y,
            eps=self.bound,
            steps=self.steps,
            schedule=self.schedule,
            draw=draw,
            keep=self.kept,
        )
        return np.asarray(adversarial)


@register
@dataclass(frozen=True, kw_only=True)
class StrongTransfer(MPDAutoPGD):
    """MPD-APGD on another network, chosen by the caller, whose attacked images are tested on the one under evaluation.

    A network of the caller's own reveals robustness that is only apparent because gradients of this one mislead.
    """

    method: ClassVar[str] = "transfer-strong"
    kind: ClassVar[Kind] = "transfer"

    schedule: Schedule = TRANSFERRED

    @property
    def settings(self) -> str:
        return f"{super().settings}, on the other network"
