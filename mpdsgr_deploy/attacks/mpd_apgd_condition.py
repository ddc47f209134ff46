"""MPD-APGD as a condition of evaluations."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpdsgr_deploy.attacks.condition import Attacked, Batch, Floats, Generators, Network, register, starts
from mpdsgr_deploy.attacks.conditions import GradientAttack, kept_iterate
from mpdsgr_deploy.attacks.counting import CountedGradients
from mpdsgr_deploy.attacks.mpd_apgd import SHARPNESSES, mpd_apgd
from mpdsgr_deploy.attacks.pgd import Draw
from mpdsgr_deploy.protocols import Differentiable
from mpdsgr_deploy.recipe import Attack

HEAVY_TAILED = "superspike"  # 1 / (1 + k |U - V_th|)^2


@register
@dataclass(frozen=True, kw_only=True)
class MPDAutoPGD(GradientAttack):
    """Adaptive steps through heavy-tailed surrogates, round after round on the images that still stand."""

    method: ClassVar[str] = "mpd-apgd"

    steps: int = 150
    rounds: int = 6
    sharpnesses: tuple[float, ...] = SHARPNESSES

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "surrogate": HEAVY_TAILED}

    @property
    def settings(self) -> str:
        names = ", ".join(f"{k:g}" for k in self.sharpnesses)
        return (
            f"MPD-APGD, eps {self.eps:.4g}, {self.rounds} rounds of {self.steps} adaptive steps on the "
            f"{self.loss.upper()} loss through {self.surrogate} of sharpness {names} in turn"
        )

    @property
    def cost(self) -> int:
        return (self.steps + 2) * self.rounds * self.draws

    def target(self, network: Network) -> AbstractContextManager[Sequence[Differentiable]]:
        return self._targets(network)

    @contextmanager
    def _targets(self, network: Network) -> Iterator[Sequence[Differentiable]]:
        with ExitStack() as stack:
            yield [
                stack.enter_context(network.attacker(f"{self.surrogate}:{k:g}", loss=self.loss, draws=self.draws))
                for k in self.sharpnesses
            ]

    def attack(self, target: Sequence[Differentiable], batch: Batch, generators: Generators) -> Attacked:
        counted = [CountedGradients(one) for one in target]
        images = self.climb(counted, batch, starts(generators))
        counts = (sum(values) for values in zip(*(one.counts for one in counted), strict=True))
        return Attacked(images, *(count * self.draws for count in counts))

    def climb(self, target: Sequence[CountedGradients], batch: Batch, draw: Draw) -> Floats:
        adversarial = mpd_apgd(
            target,
            batch.x,
            batch.y,
            eps=self.bound,
            steps=self.steps,
            draw=draw,
            keep=kept_iterate(self.keep),
            rounds=self.rounds,
        )
        return np.asarray(adversarial)
