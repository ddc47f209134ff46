"""What an attack costs: how many images its target was asked about."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mpdsgr_deploy.protocols import Array

Answer = TypeVar("Answer")


class Counted(Generic[Answer]):
    """Passes everything on to a Predictor, Differentiable or Adaptive; `evaluations` is the sum of its batch sizes.

    Around a target that averages over draws it counts an average as one.
    """

    def __init__(self, target: Callable[..., Answer]) -> None:
        self._target, self.evaluations = target, 0

    def __call__(self, x: Array, /, *rest: Any) -> Answer:
        self.evaluations += x.shape[0]
        return self._target(x, *rest)
