"""How many gradients an attack computed, and how many of them were no use to it."""

from typing import Any

import numpy as np

from mpdsgr_deploy.protocols import Array, Gradient, State


class CountedGradients:
    """A Differentiable (or Adaptive) that passes everything through and counts gradients per image.

    samples: all of them; zero: those that vanish in every pixel; not_finite: those with a NaN or infinity.
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
        """Return samples, zero and not_finite; all draws that a stochastic network averages count once."""
        return self.samples, self.zero, self.not_finite

    def start(self, count: int) -> State:
        """Return the initial state of the target for `count` images."""
        return self._target.start(count)

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        """Pass an evaluation of the target through, and count its gradients."""
        answer, next_state = self._target.step(x, y, state)
        self._count(answer)
        return answer, next_state

    def _count(self, answer: Gradient) -> None:
        flat = np.asarray(answer.gradient).reshape(len(answer.gradient), -1)
        self.samples += len(flat)
        self.zero += int((flat == 0).all(axis=1).sum())
        self.not_finite += int((~np.isfinite(flat)).any(axis=1).sum())
