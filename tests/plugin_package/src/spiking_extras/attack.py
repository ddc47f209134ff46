"""What needs no torch: a surrogate and an attack."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from array_api_compat import array_namespace

from mpdsgr_deploy.attacks.condition import Batch, Floats
from mpdsgr_deploy.attacks.conditions import GradientAttack
from mpdsgr_deploy.attacks.pgd import Draw, fgsm
from mpdsgr_deploy.protocols import Array
from mpdsgr_deploy.surrogates import Nodes, SurrogateKind


def derivative(v: Array, w: float) -> Array:
    """exp(-(v / w)^2)."""
    return array_namespace(v).exp(-((v / w) ** 2))


def nodes(graph: Nodes, v: str) -> str:
    """The same as ONNX nodes."""
    scaled = graph.emit("Mul", v, graph.inverse())
    return graph.emit("Exp", graph.emit("Neg", graph.emit("Mul", scaled, scaled)))


bell = SurrogateKind(derivative=derivative, nodes=nodes, half_width=lambda w: 1.96 * w / math.sqrt(2), width=0.7)


@dataclass(frozen=True, kw_only=True)
class HalfStep(GradientAttack):
    """A gradient step of half the size that eps allows."""

    method: ClassVar[str] = "half-step"

    @property
    def settings(self) -> str:
        """Half of eps."""
        return f"one step of {self.bound / 2:.4g} {self.through}"

    def climb(self, target: Any, batch: Batch, draw: Draw) -> Floats:
        """One step for every image."""
        return fgsm(target, batch.x, batch.y, eps=self.bound / 2)
