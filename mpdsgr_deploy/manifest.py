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

SCHEMA_VERSION = 2  # 1: no `pixels`, another name for the digests in reference.npz


class Accuracy(BaseModel):
    """Correctly classified images out of n of a data set's test images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    correct: int
    n: int

    @property
    def share(self) -> float:
        """The accuracy in [0, 1]."""
        return self.correct / self.n


class Variant(BaseModel):
    """One precision of the network, and its accuracy on clean and on attacked images at export.

    layers: the precision each layer multiplies in, by name, `readout` the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    attack: str = ""  # in older bundles a file with its attack graph, which nothing reads: it is derived when needed
    layers: dict[str, str] = {}
    accuracy: Accuracy | None = None  # None: the data set was not available
    attacked: Accuracy | None = None  # None: not measured

    @property
    def exact(self) -> bool:
        """Whether all backends agree except for float32 rounding: int8 sums are exact, other precisions round."""
        return set(self.layers.values()) <= {"fp32", "int8"}


class Prepared(BaseModel):
    """What `mpdsgr build` made of one variant for one backend on one kind of machine.

    machine: what must be equal where it is used (names of devices, versions); batch: the smallest, best and largest
    batch it takes; None: any. file: an engine; settings: the fastest measured ones, for a backend without engines.
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
        """The prefix of its file name, unique in the bundle."""
        profile = "-".join(map(str, self.batch or ("any",)))
        words = (self.backend, *self.machine.values(), self.precision, f"batch-{profile}", self.model_sha256[:8])
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower())


class NoiseInput(BaseModel):
    """An input of a stochastic network, float32 [B, *shape], for the random numbers of one of its parts.

    shape: (T, ...), a draw for every step; kind: U[0, 1) or N(0, 1). `runtime.image_noise` makes the values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["uniform", "normal"]
    shape: tuple[Count, ...]


class Manifest(BaseModel):
    """input_shape is (C, H, W); input is float32 [B, C, H, W] in [0, 1], output float32 logits [B, K]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    input_name: str
    output_name: str
    input_shape: tuple[int, int, int]
    input_range: tuple[float, float] = (0.0, 1.0)
    noise: tuple[NoiseInput, ...] = ()
    labels: tuple[str, ...]
    pixels: PixelStatistics | None = None  # of the training images; None: not known
    recipe: Recipe  # recipe of the network as exported, with its T, encoding and neuron
    trained_steps: int | None = None  # time steps it was trained with, where only the first encoding.T are exported
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
        """The number of time steps as text, with the number in training if the export has fewer."""
        T = self.recipe.encoding.T
        return f"T = {T}" if self.trained_steps is None else f"T = {T} of the {self.trained_steps} it was trained with"

    def computed_digest(self) -> str:
        """sha256 of the canonical JSON of everything but `digest`, `schema_version` and defaults.

        Defaults are left out, so that fields of later versions do not change the digests of older bundles.
        """
        left_out = {"digest", "schema_version"}
        content = json.dumps(self.model_dump(mode="json", exclude=left_out, exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
