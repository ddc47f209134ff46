"""An exported network under attack: a backend's answers, and gradients of its own ONNX file."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker, Loss, attack_session
from mpdsgr_deploy.bundle import Bundle, NoiseInput
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.protocols import Differentiable, Predictor
from mpdsgr_deploy.runtime.session import CPU, Session
from mpdsgr_deploy.surrogates import ADAPTIVE, SurrogateName, parse_surrogate

LOSSES: dict[str, Loss] = {"ce": "ce", "dlr": "dlr", "weighted": "weighted"}


class LastSession:
    """The attack graph of an ONNX file that was asked for last, kept open: a network's weights lie in it once.

    Attacks that differ in the surrogate's width or in ce and dlr alone share it. An attacker that is still in use keeps
    the one that it has.
    """

    def __init__(self, model: Path, provider: str = CPU) -> None:
        self._model, self._provider = model, provider
        self._kind: tuple[SurrogateName, bool] | None = None
        self._session: Session | None = None

    def __call__(self, surrogate: str, loss: Loss) -> Session:
        """The session for a surrogate and a loss. Raises InputError as `attack_session` does."""
        kind = parse_surrogate(surrogate)._replace(width=0.0), loss == "weighted"  # the width is an input of the graph
        if self._session is None or kind != self._kind:
            self._kind = self._session = None  # before the next one takes as much memory
            self._session = attack_session(self._model, surrogate, loss=loss, provider=self._provider)
            self._kind = kind
        return self._session


class NetworkFile:
    """An ONNX file as `attacks.suite.Network` asks: `predictor` answers, gradients are those of its attack graph.

    noise: what it draws, of which an attacker draws its own from `seed`. provider: of onnxruntime, where gradients are
    computed.
    """

    def __init__(
        self, model: Path, predictor: Predictor, noise: Sequence[NoiseInput] = (), seed: int = 0, provider: str = CPU
    ) -> None:
        self._model, self._predictor, self._noise, self._seed = model, predictor, noise, seed
        self._session, self.stochastic = LastSession(model, provider), bool(noise)

    @classmethod
    def from_bundle(cls, bundle: Bundle, precision: str, predictor: Predictor, provider: str = CPU) -> Self:
        """One precision of a bundle. Raises InputError for one that it does not have."""
        manifest = bundle.manifest
        return cls(bundle.variant(precision), predictor, manifest.noise, manifest.recipe.validation.seed, provider)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predictor(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]:
        """Raises InputError for an unknown surrogate, or a loss that attack graphs do not have."""
        return self._open(surrogate, choose("loss of attack graphs", LOSSES, loss), draws)

    def adaptive(self, *, draws: int) -> GraphAttacker:
        """Gradients through surrogates that adapt to each image."""
        return self._open(ADAPTIVE, "ce", draws)

    def _open(self, surrogate: str, loss: Loss, draws: int) -> GraphAttacker:
        return GraphAttacker(
            self._model,
            surrogate,
            loss=loss,
            noise=self._noise,
            seed=self._seed,
            draws=draws,
            session=self._session(surrogate, loss),
        )
