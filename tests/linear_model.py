"""A linear model, whose images of too small a margin any attack must break."""

import numpy as np
import torch

from mpdsgr_deploy.protocols import Array, Gradient, State

EPS = 0.1


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


class Linear:
    """Two classes, logits (0, w.x + b), as a Predictor, a Differentiable and an Adaptive in one."""

    def __init__(self, w: np.ndarray, b: float) -> None:
        self.w, self.b = w.astype(np.float32), np.float32(b)

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        kind = torch if isinstance(x, torch.Tensor) else np
        w = kind.asarray(self.w)
        value = (x * w).sum((1, 2, 3)) + self.b
        logits = kind.stack([kind.zeros_like(value), value], 1)
        if y is None:
            return logits
        sign = kind.where(y == 1, -1.0, 1.0)
        slope = sign / (1 + kind.exp(-sign * value))
        return Gradient(logits, kind.log1p(kind.exp(sign * value)), slope[:, None, None, None] * w)

    def start(self, count: int) -> State:
        return {"rows": np.arange(count)}

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        assert len(state["rows"]) == len(x)
        return self(x, y), state

    def gap(self, x: np.ndarray) -> np.ndarray:
        """By how much eps would have to exceed or fall short of breaking each image, in units of |w|_1."""
        value = (x.astype(np.float64) * self.w).sum((1, 2, 3)) + self.b
        return np.abs(value) / np.abs(self.w).sum() - EPS


def linear(shape: tuple[int, int, int] = (2, 3, 4), count: int = 120) -> tuple[Linear, np.ndarray, np.ndarray]:
    """Images so far from 0 and 1 that the minimal perturbation is |w.x + b| / |w|_1, and not just at eps."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, shape)
    w += 0.3 * np.sign(w)
    target = Linear(w, 0.0)
    x = rng.uniform(0.2, 0.8, (count, *shape)).astype(np.float32)
    x += np.float32(0.1) * rng.uniform(-1, 1, (count, 1, 1, 1)).astype(np.float32) * np.sign(w).astype(np.float32)
    target.b = np.float32(-np.median((x * target.w).sum((1, 2, 3))))
    x = x[np.abs(target.gap(x)) > 0.01]
    return target, x, target(x).argmax(1)
