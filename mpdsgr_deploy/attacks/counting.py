"""Count the gradients that an attack computes, and those it cannot use because they are zero or not finite."""

from typing import Any

import numpy as np

from mpdsgr_deploy.protocols import Array, Gradient, State


class CountedGradients:
    """Wrap a Differentiable or Adaptive, and count the gradients per image that it returns.

    samples: all gradients; zero: gradients that are zero in every pixel; not_finite: gradients with a NaN or infinity.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self.samples = self.zero = self.not_finite = 0

    def __call__(self, x: Array, y: Array) -> Gradient:
        answer: Gradient = self._target(x, y)
        self._count(answer)
        return answer

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers samples, zero and not_finite. A gradient averaged over several noise draws counts once."""
        return self.samples, self.zero, self.not_finite

    def start(self, count: int) -> State:
        """Return the target's initial surrogate state for `count` images."""
        return self._target.start(count)

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        """Evaluate the target with a surrogate state, and count its gradients."""
        answer, next_state = self._target.step(x, y, state)
        self._count(answer)
        return answer, next_state

    def _count(self, answer: Gradient) -> None:
        per_image = np.asarray(answer.gradient).reshape(len(answer.gradient), -1)
        self.samples += len(per_image)
        self.zero += int((per_image == 0).all(axis=1).sum())
        self.not_finite += int((~np.isfinite(per_image)).any(axis=1).sum())
