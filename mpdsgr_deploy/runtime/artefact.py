"""An exported network under attack: a backend's answers, and gradients of its own ONNX file."""


import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.protocols import Predictor


class Artefact:
    """One precision of a bundle, as `attacks.suite.Network` asks: `predictor` answers, the attack graph differentiates.

    An attacker draws noise of its own from `seed`, never that of the answers.
    """

    def __init__(self, bundle: Bundle, precision: str, predictor: Predictor) -> None:
        self._bundle, self._predictor, self._model = bundle, predictor, bundle.variant(precision)

    @property
    def stochastic(self) -> bool:
        """Whether the network draws noise."""
        return bool(self._bundle.manifest.noise)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predictor(x)
