"""White-box attacks on the artefact itself: gradients from the attack graph of its ONNX file, in onnxruntime."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph.derive import attack_graph
from mpdsgr_deploy.bundle import Bundle, NoiseInput
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.onnx_files import CLASSES, GRADIENT, LOSS, MEAN, NEW, WEIGHTED, WIDTH, read_network
from mpdsgr_deploy.protocols import Differentiable, Gradient, Predictor, State
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.session import CPU, Session, failure
from mpdsgr_deploy.surrogates import ADAPTIVE, SurrogateName, parse_surrogate

Loss = Literal["ce", "dlr", "weighted"]
LOSSES: dict[str, Loss] = {"ce": "ce", "dlr": "dlr", "weighted": "weighted"}
CHUNK = 32  # images per run of the graph
ADDED_INPUTS = (CLASSES, WIDTH, LOSS, WEIGHTED)  # the inputs that an attack graph adds to the network's


class GraphAttacker(AbstractContextManager["GraphAttacker"]):
    """A Differentiable and Adaptive for an ONNX file, through any surrogate "KIND" or "KIND:WIDTH".

    It derives the attack graph in memory from the file under attack, and closes its session at the end of a with block.

    loss: the loss that an attack maximises, "ce" (cross-entropy) or "dlr" (difference of logits ratio); or "weighted",
        for which calls take weights [B, K] instead of classes, and the loss is weights . logits.
    noise, seed, draws: the noise inputs of a stochastic network (`Manifest.noise`). Every evaluation draws new noise
        from a generator of `seed`, and averages over `draws` of it (EOT).
    settings: threads of the CPU provider (default: one per core) and images per run (default: 32), which bound the
        memory; see benchmarks/README.md.
    session: a session of `attack_session` for the same kind and file, which is left open; None opens one.

    Raises InputError for an unknown surrogate, for noise inputs that are not the network's, and for a graph that this
    machine cannot run.
    """

    def __init__(
        self,
        model: Path,
        surrogate: str,
        *,
        loss: Loss = "ce",
        noise: Sequence[NoiseInput] = (),
        seed: int = 0,
        draws: int = 1,
        provider: str = CPU,
        settings: RuntimeSettings | None = None,
        session: Session | None = None,
    ) -> None:
        settings = RuntimeSettings() if settings is None else settings
        self._weighted, self._owns = loss == "weighted", session is None
        self._session = session or attack_session(model, surrogate, loss=loss, provider=provider, settings=settings)
        (self._input, shape), *others = self._session.inputs.items()
        self._shape = shape[1:]
        self._states = {name: shape[1:] for name, shape in others if f"{name}{NEW}" in self._session.outputs}
        expected_noise = {
            name: tuple(shape[1:]) for name, shape in others if name not in (*ADDED_INPUTS, *self._states)
        }
        if expected_noise != {entry.name: entry.shape for entry in noise}:
            raise InputError(
                f"{model} takes the noise {expected_noise or 'none'}; pass the entries of its manifest to the attacker"
            )
        self._noise, self._draws, self._random = tuple(noise), draws if noise else 1, np.random.default_rng([seed, 1])
        self._scalars = {WIDTH: np.array(parse_surrogate(surrogate).width, np.float32)}
        if not self._weighted:
            self._scalars[LOSS] = np.array(loss == "dlr", np.float32)
        losses = [] if self._weighted else [loss]
        self._outputs = [self._session.outputs[0], *losses, GRADIENT, *(f"{name}{NEW}" for name in self._states)]
        self._chunk = settings.chunk or CHUNK

    def __call__(self, x: NDArray[np.float32], y: NDArray[Any]) -> Gradient:
        """Return the gradient at images x [B, C, H, W] in [0, 1] for classes y [B], or weights [B, K].

        The surrogate `adaptive` has its initial state. Raises InputError as `step` does.
        """
        return self.step(x, y, self.start(len(x)))[0]

    def start(self, count: int) -> State:
        """Return the initial state of the surrogate `adaptive` for `count` images; it is empty for other surrogates."""
        initial = {name: float(name.startswith(MEAN)) for name in self._states}
        return {name: np.full((count, *shape), initial[name], np.float32) for name, shape in self._states.items()}

    def step(self, x: NDArray[np.float32], y: NDArray[Any], state: State) -> tuple[Gradient, State]:
        """Return the gradient at one evaluation of an attack, and the state for the next evaluation.

        Begin every attack with `start`. If images leave the batch, take the same rows of every array of the state.
        Raises InputError for images of another shape and for a graph that fails on this machine.
        """
        check_images(x, self._shape)
        parts = []
        for start in range(0, len(x), self._chunk):
            rows = slice(start, start + self._chunk)
            parts.append(self._averaged(x[rows], y[rows], {name: value[rows] for name, value in state.items()}))
        logits, *rest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        loss, gradient, *states = [(y * logits).sum(axis=1), *rest] if self._weighted else rest
        return Gradient(logits, loss, gradient), dict(zip(self._states, states, strict=True))

    def _averaged(self, x: NDArray[np.float32], y: NDArray[Any], state: State) -> list[NDArray[np.float32]]:
        """Return all outputs for one chunk, averaged over draws of the noise."""
        total: list[NDArray[np.float32]] = []
        for _ in range(self._draws):
            inputs: dict[str, NDArray[Any]] = {
                self._input: x,
                WEIGHTED if self._weighted else CLASSES: y,
                **self._scalars,
            }
            try:
                outputs = self._session({**inputs, **state, **self._fresh(len(x))}, self._outputs)
            except Exception as error:  # onnxruntime's errors share no public base class
                raise failure(f"fails on the gradients of {len(x)} images", error) from error
            total = [a + b for a, b in zip(total, outputs, strict=True)] if total else outputs
        return [array / np.float32(self._draws) for array in total] if self._draws > 1 else total

    def _fresh(self, count: int) -> dict[str, NDArray[np.float32]]:
        draws: dict[str, NDArray[np.float32]] = {}
        for entry in self._noise:
            draw = self._random.random if entry.kind == "uniform" else self._random.standard_normal
            draws[entry.name] = draw((count, *entry.shape), np.float32)
        return draws

    def __exit__(self, *exception: object) -> None:
        if self._owns:
            self._session.__exit__()


def attack_session(
    model: Path, surrogate: str, *, loss: Loss = "ce", provider: str = CPU, settings: RuntimeSettings | None = None
) -> Session:
    """Open the attack graph of an ONNX file. One session serves every width of the surrogate, and both ce and dlr.

    The session stores no second, packed copy of the weights: packing them in every run costs no measurable time,
    because a run computes many images. Raises InputError for an unknown surrogate, for a network that has no attack
    graph, and for a graph that this machine cannot run.
    """
    graph = attack_graph(read_network(model), surrogate, weighted=loss == "weighted")
    threads = None if settings is None else settings.threads
    return Session(graph, provider, source=f"the attack graph of {model}", threads=threads, packs=False)


class NetworkFile:
    """An ONNX file as an `attacks.condition.Network`: `predictor` computes logits, the attack graph gradients.

    noise: the network's noise inputs, for which every attacker draws from a generator of `seed`. provider: the
    execution provider of onnxruntime that computes gradients.

    The session of the latest attack graph stays open, so that the network's weights are in memory only once. Attacks
    that differ only in the surrogate's width, or only between the losses ce and dlr, share it. An attacker that is
    still in use keeps its session.
    """

    def __init__(
        self, model: Path, predictor: Predictor, noise: Sequence[NoiseInput] = (), seed: int = 0, provider: str = CPU
    ) -> None:
        self._model, self._predictor, self._noise, self._seed = model, predictor, noise, seed
        self._provider, self.stochastic = provider, bool(noise)
        self._kind: tuple[SurrogateName, bool] | None = None
        self._session: Session | None = None

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
        kind = parse_surrogate(surrogate)._replace(width=0.0), loss == "weighted"  # the width is an input of the graph
        if self._session is None or kind != self._kind:
            self._session = None  # free its memory before the next one needs as much
            self._session = attack_session(self._model, surrogate, loss=loss, provider=self._provider)
            self._kind = kind
        return GraphAttacker(
            self._model,
            surrogate,
            loss=loss,
            noise=self._noise,
            seed=self._seed,
            draws=draws,
            session=self._session,
        )
