"""An exported network under attack: a backend's answers, and gradients of its own ONNX file."""

from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph import ADAPTIVE
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.protocols import Differentiable, Predictor
from mpdsgr_deploy.runtime.attacker import GraphAttacker, Loss

LOSSES: dict[str, Loss] = {"ce": "ce", "dlr": "dlr"}


class Artefact:
    """One precision of a bundle as `attacks.suite.Network` asks: `predictor` answers, the attack graph differentiates.

    An attacker draws noise of its own, never that of the answers.
    """

    def __init__(self, bundle: Bundle, precision: str, predictor: Predictor) -> None:
        self._bundle, self._precision, self._predictor = bundle, precision, predictor

    @property
    def stochastic(self) -> bool:
        """Whether the network draws noise."""
        return bool(self._bundle.manifest.noise)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predictor(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]:
        """Raises InputError for an unknown surrogate, or a loss that attack graphs do not have."""
        kind = choose("loss of attack graphs", LOSSES, loss)
        return GraphAttacker.from_bundle(self._bundle, self._precision, surrogate, loss=kind, draws=draws)

    def adaptive(self, *, draws: int) -> GraphAttacker:
        """Through surrogates that adapt."""
        return GraphAttacker.from_bundle(self._bundle, self._precision, ADAPTIVE, draws=draws)
