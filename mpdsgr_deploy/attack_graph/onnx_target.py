"""An exported network under attack: logits from a backend, gradients from the attack graph of its ONNX file."""

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
    """Keep the session of the latest attack graph open, so that a network's weights are in memory only once.

    Attacks that differ only in the surrogate's width, or only between the losses ce and dlr, share a session. An
    attacker that is still in use keeps its session.
    """

    def __init__(self, model: Path, provider: str = CPU) -> None:
        self._model, self._provider = model, provider
        self._kind: tuple[SurrogateName, bool] | None = None
        self._session: Session | None = None

    def __call__(self, surrogate: str, loss: Loss) -> Session:
        """Return the session for a surrogate and a loss. Raises InputError as `attack_session` does."""
        kind = parse_surrogate(surrogate)._replace(width=0.0), loss == "weighted"  # the width is an input of the graph
        if self._session is None or kind != self._kind:
            self._kind = self._session = None  # free its memory before the next one needs as much
            self._session = attack_session(self._model, surrogate, loss=loss, provider=self._provider)
            self._kind = kind
        return self._session


class NetworkFile:
    """An ONNX file as an `attacks.condition.Network`: `predictor` computes logits, the attack graph gradients.

    noise: the network's noise inputs, for which every attacker draws from a generator of `seed`. provider: the
    execution provider of onnxruntime that computes gradients.
    """

    def __init__(
        self, model: Path, predictor: Predictor, noise: Sequence[NoiseInput] = (), seed: int = 0, provider: str = CPU
    ) -> None:
        self._model, self._predictor, self._noise, self._seed = model, predictor, noise, seed
        self._session, self.stochastic = LastSession(model, provider), bool(noise)

    @classmethod
    def from_bundle(cls, bundle: Bundle, precision: str, predictor: Predictor, provider: str = CPU) -> Self:
        """Return the network of one precision of a bundle. Raises InputError for a precision that the bundle lacks."""
        manifest = bundle.manifest
        return cls(bundle.variant(precision), predictor, manifest.noise, manifest.recipe.validation.seed, provider)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predictor(x)

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]:
        """Return a context manager of gradients. Raises InputError for an unknown surrogate or loss."""
        return self._open(surrogate, choose("loss of attack graphs", LOSSES, loss), draws)

    def adaptive(self, *, draws: int) -> GraphAttacker:
        """Return a context manager of gradients through surrogates that adapt to each image (ASSG)."""
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
