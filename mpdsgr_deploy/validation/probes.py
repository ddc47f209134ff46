"""Looks at a part of the images that health checks need and figures show: growing eps, and twice the steps."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import FGSM, STRONG, Condition
from mpdsgr_deploy.attacks.run import Journal, gather, run
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.progress import track

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the recipe's eps
GROWTH_STEPS = 20  # of the strong PGD
LARGE = (0.5, 1.0)  # where any image can be painted

Bools = NDArray[np.bool_]
Classes = NDArray[np.int64]


class Probe:
    """Some images x [m, C, H, W] with classes y [m], which the suite's network takes, as they are, for `clean` [m]."""

    def __init__(
        self,
        suite: Suite,
        x: NDArray[np.float32],
        y: Classes,
        clean: Classes,
        *,
        batch_size: int,
        journal: Journal | None,
    ) -> None:
        self._suite, self._x, self._y, self._clean = suite, x, y, clean
        self._size, self._journal = batch_size, journal

    def growth(self) -> dict[str, dict[float, Bools]]:
        """Verdicts [m] under FGSM and under the strong PGD by eps, from 0 to 1."""
        attacks = {c.name: c for c in self._suite.conditions if c.name in (FGSM, STRONG)}
        eps = attacks[FGSM].bound
        radii = sorted({round(multiple * eps, 9) for multiple in MULTIPLES if multiple * eps < 1} | set(LARGE))
        left: dict[str, dict[float, Bools]] = {name: {0.0: self._clean == self._y} for name in (FGSM, STRONG)}
        quick = {FGSM: attacks[FGSM], STRONG: replace(attacks[STRONG], steps=GROWTH_STEPS, restarts=1)}
        for radius in track(radii, "growing eps"):
            for name, attack in quick.items():
                grown = replace(attack, name=f"{name} at {radius:g}", eps=radius, stream=name)
                left[name][radius] = self._verdicts(grown, self._clean)
        return left

    def convergence(self, condition: Condition, standing: Bools) -> int:
        """How many of the images `standing` [m] after all attacks this one breaks with twice the steps.

        It starts at the same points.
        """
        steps = 2 * condition.steps
        longer = replace(
            condition, name=f"{condition.name} {steps} steps", steps=steps, restarts=1, stream=condition.name
        )
        left = np.where(standing, self._clean, -1)  # what is broken already counts as wrong from the start
        after = self._verdicts(longer, left)
        return int((standing & ~after).sum())

    def _verdicts(self, condition: Condition, clean: Classes) -> Bools:
        batches = run(self._suite, condition, self._x, self._y, clean, batch_size=self._size, journal=self._journal)
        _, predicted = gather(list(batches))
        return predicted == self._y
