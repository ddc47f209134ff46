"""Count the gradients that an attack computes, and those it cannot use because they are zero or not finite."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpdsgr_deploy.protocols import Array, Gradient, State


@dataclass
class GradientCounts:
    """The gradients per image that an attack computes; one averaged over several noise draws counts once.

    samples: all gradients; zero: gradients that are zero in every pixel; not_finite: gradients with a NaN or infinity.
    """

    samples: int = 0
    zero: int = 0
    not_finite: int = 0

    def add(self, answer: Gradient) -> None:
        per_image = np.asarray(answer.gradient).reshape(len(answer.gradient), -1)
        self.samples += len(per_image)
        self.zero += int((per_image == 0).all(axis=1).sum())
        self.not_finite += int((~np.isfinite(per_image)).any(axis=1).sum())


@dataclass(frozen=True)
class CountedGradients:
    """A Differentiable or Adaptive whose gradients are added to `counts`."""

    target: Any
    counts: GradientCounts

    def __call__(self, x: Array, y: Array) -> Gradient:
        answer: Gradient = self.target(x, y)
        self.counts.add(answer)
        return answer

    def start(self, count: int) -> State:
        """Return the target's initial surrogate state for `count` images."""
        return self.target.start(count)

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        """Evaluate the target with a surrogate state."""
        answer, next_state = self.target.step(x, y, state)
        self.counts.add(answer)
        return answer, next_state
