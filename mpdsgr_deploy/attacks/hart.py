"""HART: APGD along gradients that are averaged over time, through surrogates of several widths.

    dL/dI[t] = mean over s of dL/dO[s] dO/dU(U[s] - V_th)          the same for the current I[t] of every step t

No gradient passes through membrane, leak or reset. The wider the surrogate, the more the gradient depends on firing
rates; the narrower, the more it depends on the steps in which a potential is near the threshold.

Source: Hao et al., "Threaten Spiking Neural Networks through Combining Rate and Temporal Information", ICLR 2024. Their
code uses triangular surrogates of one width between 0.1 and 2.5, the best for the whole data set, and the steps of PGD.
Here every image is attacked with several widths in turn, with the steps of APGD.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.condition import Batch, Floats, Network, register
from mpdsgr_deploy.attacks.conditions import GradientAttack
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.pgd import Draw, fixed, wide
from mpdsgr_deploy.protocols import Array, Differentiable
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.surrogates import AVERAGED


def hart(
    targets: Sequence[Differentiable],
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 100,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
) -> Array:
    """Return adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], by APGD on one target after the other.

    targets: the same network, differentiated through surrogates whose names end in "+averaged". An image costs at most
    steps + 2 gradients per target.
    draw, keep: see `apgd`. Each target has its own random start; all starts are drawn in advance. With "broken", an
    image that fools a target is attacked no further.
    """
    xp = array_namespace(x)
    offsets = [None if draw is None else draw(x.shape) for _ in targets]
    adversarial, active = xp.asarray(x, copy=True), xp.arange(x.shape[0], device=device(x))
    largest = xp.full((x.shape[0],), -xp.inf, dtype=x.dtype, device=device(x))
    for target, offset in zip(targets, offsets, strict=True):
        if not active.shape[0]:
            break
        start = fixed(offset, active)
        attempt = apgd(target, x[active], y[active], eps=eps, steps=steps, draw=start, keep=keep)
        logits, loss, _ = target(attempt, y[active])
        standing, higher = xp.argmax(logits, axis=1) == y[active], loss > largest[active]
        chosen = higher if keep == "worst" else higher | ~standing
        adversarial[active] = xp.where(wide(chosen), attempt, adversarial[active])
        largest[active] = xp.where(higher, loss, largest[active])
        if keep == "broken":
            active = active[standing]
    return adversarial


@register
@dataclass(frozen=True, kw_only=True)
class HART(GradientAttack):
    """`hart` through one kind of surrogate, for networks that this package trained and exported."""

    method: ClassVar[str] = "hart"

    steps: int = 100
    widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "surrogate": "triangle"}

    @property
    def settings(self) -> str:
        widths = ", ".join(f"{width:g}" for width in self.widths)
        return (
            f"HART, eps {self.eps:.4g}, {self.steps} steps of adaptive size on the {self.loss.upper()} loss along "
            f"gradients averaged over time, {self.through} of width {widths} in turn"
        )

    @property
    def cost(self) -> int:
        return (self.steps + 2) * len(self.widths) * self.draws

    @contextmanager
    def target(self, network: Network) -> Iterator[Sequence[Differentiable]]:
        with ExitStack() as stack:
            names = [f"{self.surrogate}:{width:g}{AVERAGED}" for width in self.widths]
            yield [stack.enter_context(network.attacker(name, loss=self.loss, draws=self.draws)) for name in names]

    def counted(self, target: Sequence[Differentiable], counts: GradientCounts) -> list[CountedGradients]:
        return [CountedGradients(one, counts) for one in target]

    def climb(self, target: Sequence[CountedGradients], batch: Batch, draw: Draw) -> Floats:
        return hart(target, batch.x, batch.y, eps=self.bound, steps=self.steps, draw=draw, keep=self.kept)
