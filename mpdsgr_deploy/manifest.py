"""The schema of a bundle's manifest.json, and its digest."""

import hashlib
import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.data.likeness import PixelStatistics
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import Promise
from mpdsgr_deploy.schema import Count


class Accuracy(BaseModel):
    """How many of n test images of the data set `data` are classified correctly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    correct: int
    n: int

    @property
    def share(self) -> float:
        """The accuracy in [0, 1]."""
        return self.correct / self.n


class Variant(BaseModel):
    """One precision of the network: its ONNX file, and its accuracy on clean and on attacked images at export.

    layers: the precision in which each layer multiplies, by name; the last is `readout`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    attack: str = ""  # a file with the attack graph in older bundles; not read, since graphs are derived when needed
    layers: dict[str, str] = {}
    accuracy: Accuracy | None = None  # None: the data set was not available
    attacked: Accuracy | None = None  # None: not measured

    @property
    def exact(self) -> bool:
        """Whether backends differ only by float32 rounding, since int8 sums are exact; other precisions also round."""
        return set(self.layers.values()) <= {"fp32", "int8"}


class Prepared(BaseModel):
    """What `mpdsgr build` made of one precision for one backend on one kind of machine.

    machine: names of devices and versions, which must be equal on the machine that uses it. batch: the smallest, the
    best and the largest batch size; None: any. file: the engine; None for a backend without engines, for which settings
    has those that were measured to be fastest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    precision: str
    model_sha256: str  # sha256 of the ONNX file that it was made from
    machine: dict[str, str]
    batch: tuple[int, int, int] | None = None
    file: str | None = None
    settings: dict[str, Any] = {}

    @property
    def key(self) -> str:
        """The beginning of the engine's file name, which is unique in the bundle."""
        profile = "-".join(map(str, self.batch or ("any",)))
        words = (self.backend, *self.machine.values(), self.precision, f"batch-{profile}", self.model_sha256[:8])
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower())


class NoiseInput(BaseModel):
    """An input float32 [B, *shape] of a stochastic network, for the random numbers of one of its parts.

    shape: (T, ...), with numbers for every time step. kind: U[0, 1) or N(0, 1). `runtime.image_noise` draws them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["uniform", "normal"]
    shape: tuple[Count, ...]


class Manifest(BaseModel):
    """The content of manifest.json.

    The network's input is float32 [B, C, H, W] in `input_range`, with (C, H, W) = `input_shape`, and its output float32
    logits [B, K] for the K `labels`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 2  # 1: no `pixels`, another name for the digests in reference.npz
    input_name: str
    output_name: str
    input_shape: tuple[int, int, int]
    input_range: tuple[float, float] = (0.0, 1.0)
    noise: tuple[NoiseInput, ...] = ()
    labels: tuple[str, ...]
    pixels: PixelStatistics | None = None  # of the training images; None: not known
    recipe: Recipe  # recipe of the network as exported, with its T, encoding and neuron
    trained_steps: int | None = None  # time steps in training, if only the first encoding.T of them are exported
    # trained by this package, exported from a torch module, or adopted as an ONNX file
    origin: Literal["trained", "module", "adopted"] = "trained"
    variants: dict[str, Variant]
    reference: Promise | None = None  # None: the data set was not available
    prepared: tuple[Prepared, ...] = ()
    provenance: dict[str, Any]
    files: dict[str, str]  # relative path -> sha256
    digest: str = ""  # sha256 of this document, see `computed_digest`

    @property
    def time_steps(self) -> str:
        """The number of time steps as text, with the number in training if fewer are exported."""
        T = self.recipe.encoding.T
        return f"T = {T}" if self.trained_steps is None else f"T = {T} of the {self.trained_steps} it was trained with"

    def computed_digest(self) -> str:
        """Return the sha256, in hex, of this document as JSON with sorted keys.

        `digest`, `schema_version` and values that are defaults are left out, so that fields that later versions add do
        not change the digests of older bundles.
        """
        left_out = {"digest", "schema_version"}
        content = json.dumps(self.model_dump(mode="json", exclude=left_out, exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
