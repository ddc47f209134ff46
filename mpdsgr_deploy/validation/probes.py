"""Looks at a part of the images that health checks need and figures show: growing eps, and twice the steps."""

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.run import Journal, gather, run
from mpdsgr_deploy.attacks.suite import FGSM, STRONG, Condition, Suite
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.protocols import Predictor

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the recipe's eps
GROWTH_STEPS = 20  # of the strong PGD
LARGE = (0.5, 1.0)  # where any image can be painted

Bools = NDArray[np.bool_]
Classes = NDArray[np.int64]


class Probe:
    """Some images x [m, C, H, W] with classes y [m], which the artefact takes, as they are, for `clean` [m]."""

    def __init__(
        self,
        suite: Suite,
        artefact: Predictor,
        x: NDArray[np.float32],
        y: Classes,
        clean: Classes,
        *,
        batch_size: int,
        journal: Journal | None,
    ) -> None:
        self._suite, self._artefact, self._x, self._y, self._clean = suite, artefact, x, y, clean
        self._size, self._journal = batch_size, journal

    def growth(self, eps: float, surrogate: str) -> dict[str, dict[float, Bools]]:
        """Verdicts [m] under FGSM and under the strong PGD by eps, from 0 to 1."""
        radii = sorted({round(multiple * eps, 9) for multiple in MULTIPLES if multiple * eps < 1} | set(LARGE))
        found: dict[str, dict[float, Bools]] = {name: {0.0: self._clean == self._y} for name in (FGSM, STRONG)}
        for radius in track(radii, "growing eps"):
            fgsm = self._suite.fgsm(radius)
            strong = self._suite.strong(STRONG, surrogate, eps=radius, steps=GROWTH_STEPS)
            for condition in (fgsm, strong):
                named = condition._replace(name=f"{condition.name} at {radius:g}")
                found[condition.name][radius] = self._verdicts(named, self._clean)
        return found

    def convergence(self, name: str, surrogate: str, steps: int, standing: Bools) -> int:
        """How many of the images `standing` [m] after all attacks the one called `name` breaks with twice the steps."""
        condition = self._suite.strong(name, surrogate, steps=2 * steps)  # from the same random starts
        left = np.where(standing, self._clean, -1)  # what is broken already counts as wrong from the start
        after = self._verdicts(condition._replace(name=f"{name} {2 * steps} steps"), left)
        return int((standing & ~after).sum())

    def _verdicts(self, condition: Condition, clean: Classes) -> Bools:
        parts = run(
            condition,
            self._x,
            self._y,
            self._artefact,
            clean,
            batch_size=self._size,
            journal=self._journal,
        )
        _, predicted = gather(list(parts))
        return predicted == self._y
