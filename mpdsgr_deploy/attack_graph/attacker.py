"""White-box attacks on the artefact itself: gradients from the attack graph of its ONNX file, in onnxruntime."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph.derive import attack_graph
from mpdsgr_deploy.bundle import NoiseInput
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.onnx_files import CLASSES, GRADIENT, LOSS, MEAN, NEW, WEIGHTED, WIDTH, read_network
from mpdsgr_deploy.protocols import Gradient, State
from mpdsgr_deploy.runtime.image_batches import check_images
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.session import CPU, Session, failure
from mpdsgr_deploy.surrogates import parse_surrogate

Loss = Literal["ce", "dlr", "weighted"]
CHUNK = 32  # images computed at once
OWN = (CLASSES, WIDTH, LOSS, WEIGHTED)  # inputs that an attack graph adds


class GraphAttacker(AbstractContextManager["GraphAttacker"]):
    """A Differentiable on an ONNX file, through any surrogate "KIND" or "KIND:WIDTH" that the attacker chooses.

    A context manager: the session ends with the block. The attack graph is derived here, in memory, from the file that
    is under attack. loss: what an attack maximises, cross-entropy or the difference of logits ratio, or "weighted":
    calls then take weights [B, K] in the place of classes, and the loss is weights . logits. A stochastic network meets
    the noise of its inputs `noise` (`Manifest.noise`) fresh in every evaluation, from a generator of `seed`, and is
    averaged over `draws` of it (EOT). settings: threads of the CPU provider (default: one per core) and images computed
    at once (default: 32), which bounds the memory: see benchmarks/README.md. session: one of `attack_session` for the
    same kind and file, which stays open.

    Raises InputError for an unknown surrogate, noise that is not the network's, or what this machine cannot run.
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
        expected_noise = {name: tuple(shape[1:]) for name, shape in others if name not in (*OWN, *self._states)}
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

        An `adaptive` surrogate is in the state of an attack's first step.

        """
        return self.step(x, y, self.start(len(x)))[0]

    def start(self, count: int) -> State:
        """Return the initial state of `adaptive` for `count` images; it is empty for other surrogates."""
        initial = {name: float(name.startswith(MEAN)) for name in self._states}
        return {name: np.full((count, *shape), initial[name], np.float32) for name, shape in self._states.items()}

    def step(self, x: NDArray[np.float32], y: NDArray[Any], state: State) -> tuple[Gradient, State]:
        """Return the gradient at one evaluation of an attack, and the state for the next.

        Every attack begins with `start`; if images leave the batch, take the same rows of everything in the state.
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

    Weights are stored once: an attack computes many images at a time, so that packing them in every run costs nothing
    that could be measured. Raises InputError as `GraphAttacker` does.
    """
    graph = attack_graph(read_network(model), surrogate, weighted=loss == "weighted")
    threads = None if settings is None else settings.threads
    return Session(graph, provider, source=f"the attack graph of {model}", threads=threads, packs=False)
