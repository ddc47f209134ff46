"""An exported network under attack: a backend's answers, and gradients of its own ONNX file."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker, Loss
from mpdsgr_deploy.bundle import Bundle, NoiseInput
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.protocols import Differentiable, Predictor
from mpdsgr_deploy.runtime.session import CPU
from mpdsgr_deploy.surrogates import ADAPTIVE

LOSSES: dict[str, Loss] = {"ce": "ce", "dlr": "dlr", "weighted": "weighted"}


class Artefact:
    """One precision of a bundle as `attacks.suite.Network` asks: `predictor` answers, the attack graph differentiates.

    provider: of onnxruntime, where gradients are computed. An attacker draws noise of its own, not that of the answers.
    """

    def __init__(self, bundle: Bundle, precision: str, predictor: Predictor, provider: str = CPU) -> None:
        self._bundle, self._precision, self._predictor, self._provider = bundle, precision, predictor, provider

    @property
    def stochastic(self) -> bool:
        """Whether the network draws noise."""
        return bool(self._bundle.manifest.noise)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predictor(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]:
        """Raises InputError for an unknown surrogate, or a loss that attack graphs do not have."""
        kind = choose("loss of attack graphs", LOSSES, loss)
        return self._open(surrogate, kind, draws)

    def adaptive(self, *, draws: int) -> GraphAttacker:
        """Gradients through surrogates that adapt to each image."""
        return self._open(ADAPTIVE, "ce", draws)

    def _open(self, surrogate: str, loss: Loss, draws: int) -> GraphAttacker:
        return GraphAttacker.from_bundle(
            self._bundle, self._precision, surrogate, loss=loss, draws=draws, provider=self._provider
        )


class NetworkFile:
    """An ONNX file under attack before it is in a bundle; `predictor` answers.

    noise: what it draws, of which an attacker draws its own from `seed`.
    """

    def __init__(self, model: Path, predictor: Predictor, noise: Sequence[NoiseInput] = (), seed: int = 0) -> None:
        self._model, self._predictor, self._noise, self._seed = model, predictor, noise, seed
        self.stochastic = bool(noise)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predictor(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]:
        """Raises InputError for an unknown surrogate, or a loss that attack graphs do not have."""
        return self._open(surrogate, choose("loss of attack graphs", LOSSES, loss), draws)

    def adaptive(self, *, draws: int) -> GraphAttacker:
        return self._open(ADAPTIVE, "ce", draws)

    def _open(self, surrogate: str, loss: Loss, draws: int) -> GraphAttacker:
        return GraphAttacker(self._model, surrogate, loss=loss, noise=self._noise, seed=self._seed, draws=draws)
