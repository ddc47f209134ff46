"""Random perturbations, the yardstick an attack must beat."""

import numpy as np
from numpy.typing import NDArray


def uniform(x: NDArray[np.float32], *, eps: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """x + U(-eps, eps) per pixel, clipped to [0, 1]."""
    return np.clip(x + rng.uniform(-eps, eps, x.shape).astype(np.float32), 0, 1)


def gaussian(x: NDArray[np.float32], *, std: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """x + N(0, std^2) per pixel, clipped to [0, 1]; not bounded by any eps."""
    return np.clip(x + rng.normal(0, std, x.shape).astype(np.float32), 0, 1)
