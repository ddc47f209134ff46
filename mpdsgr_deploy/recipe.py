"""Recipes: typed TOML files that define a training run completely; an unknown key is an error.

Defaults are those of the SNN-RAT family of papers. Numbers such as eps may be written as fractions: "8/255".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.schema import (
    Count,
    NonNegative,
    Number,
    Positive,
    Section,
    Seed,
    UnitInterval,
    override,
    parse,
    read_toml,
)

# What an attacker may put in place of the training surrogate; see mpdsgr_deploy.attacks.attacker_surrogate
SWEEP = (
    "triangle:0.25",
    "triangle:0.5",
    "triangle:1",
    "triangle:2",
    "triangle:3",
    "rectangular",
    "exponential",
    "straight-through",
    "rate",
)


class Data(Section):
    """Which images are used, and how they are augmented in training."""

    name: str = "cifar10"
    root: str = "data"  # where the data set's files lie
    train_images: Count | None = None  # use only this many training images (a fixed random choice)
    # share of the training images that is used for model selection
    validation_share: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    augment: Literal["none", "crop", "crop-flip"] = "crop-flip"
    crop_padding: Count = 4
    image_size: Count | None = None  # imagefolder only: shorter side resized to this, centre cropped
    frames: Count | None = None  # n-mnist only: frames a recording is cut into; with encoding "frames" T equals it

    def at(self, root: str | None) -> "Data":
        """Return the same data set with its files in `root`; None keeps `self.root`."""
        return self if root is None else self.model_copy(update={"root": root})


class Model(Section):
    """Which architecture is used; `mpdsgr_deploy.models.MODELS` holds the names."""

    name: str = "vgg11"
    width: Annotated[Number, Field(gt=0, le=16)] = 1.0  # multiplies every layer's width
    norm: Literal["tdbn", "bn", "none"] = "tdbn"
    readout: Literal["mean", "membrane"] = "mean"  # readout of the last linear layer over time; see models.spiking_net


class Neuron(Section):
    """The LIF neuron and its surrogate gradient; see `mpdsgr_deploy.snn.neuron`."""

    tau: Annotated[Number, Field(gt=0, le=1)] = 0.5
    v_threshold: Positive = 1.0
    reset: Literal["hard", "soft"] = "hard"
    surrogate: str = "triangle"
    surrogate_parameter: Positive | None = None  # g, a, a or k; None: the surrogate's own default
    detach_reset: bool = False  # spikes that reset pass no gradient on, as in snnTorch and, if asked, SpikingJelly


class EncodingSection(Section):
    """How an image becomes T time steps; see `mpdsgr_deploy.snn.encoding`."""

    name: str = "direct"
    T: Count = 8
    std: NonNegative = 0.25  # rsc: standard deviation of the noise added to pixels in [0, 1]
    levels: Count = 2  # sqe: steps between a black and a white pixel; 1 is poisson
    # frequency: the radius of each step's low-pass; None: evenly from half the image's side down
    radii: Annotated[tuple[Count, ...], Field(strict=False)] | None = None


class Stage(Section):
    """A number of epochs at T time steps instead of encoding.T."""

    epochs: Count
    T: Count


class Training(Section):
    """SGD with a cosine schedule to zero, and where it runs."""

    epochs: Count = 300
    batch_size: Count = 64  # images per optimiser step, over all devices and accumulation steps
    accumulate: Count = 1  # forward passes per optimiser step
    lr: Positive = 0.1
    momentum: UnitInterval = 0.9
    weight_decay: NonNegative = 5e-4
    label_smoothing: UnitInterval = 0.0  # share of the cross-entropy's target that is spread over all classes
    # first epochs at other T, in this order; the rest of `epochs` runs at encoding.T. See mpdsgr_deploy.training.stages
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    # decay per step of an exponential average of the weights, which is then what is validated and saved; 0: none
    average: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    nodes: Count = 1  # machines, each with `devices`; see mpdsgr_deploy.training.launch
    devices: Count = 1  # devices per node; each normalises its own share of the batch, unless sync_norm
    sync_norm: bool = False  # tdBN's statistics are joint over all devices; regularisers read each share
    # recompute layers in the backward pass instead of keeping their tensors
    recompute: Literal["none", "layers"] = "none"
    pictures: Annotated[int, Field(ge=0)] = 10  # epochs between drawings of the membrane in TensorBoard; 0: none
    attacked_images: Annotated[int, Field(ge=0)] = 0  # the first validation images, under [attack]'s PGD each epoch
    seed: Seed = 0

    @property
    def processes(self) -> int:
        """How many processes train together: one per device of every node."""
        return self.nodes * self.devices

    @model_validator(mode="after")
    def _divides(self) -> "Training":
        parts = self.processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of nodes * devices * accumulate = {parts}"
            )
        return self

    @model_validator(mode="after")
    def _ends_at_the_encodings_steps(self) -> "Training":
        staged = sum(stage.epochs for stage in self.stages)
        if self.stages and staged >= self.epochs:
            raise ValueError(
                f"stages take {staged} epochs, so none of epochs = {self.epochs} is left for training at encoding.T; "
                "raise epochs or shorten stages"
            )
        return self


class Attack(Section):
    """The attacks of `mpdsgr validate`, in the L-infinity ball of radius eps; Gaussian noise, CW-L2 and those on events
    have other bounds.
    """

    eps: Annotated[Number, Field(gt=0, le=1)] = 8 / 255
    steps: Count = 7  # BIM and PGD in the paper's setting
    step: Positive = 0.01
    strong_steps: Count = 40  # PGD with step eps/4; an image is broken once any iterate fools the model
    surrogates: Annotated[tuple[str, ...], Field(strict=False)] = SWEEP  # strong PGD through each of these too
    draws: Count = 8  # draws over which a stochastic network's gradient is averaged
    l2: Positive | None = None  # also CW-L2: an image is broken if it is fooled within this L2 distance
    gaussian_std: NonNegative = 0.1
    events: Count = 20  # largest number of events that an attack adds, removes or moves; see attacks.event_conditions
    also: Annotated[tuple[str, ...], Field(strict=False)] = ()  # other registered attacks, made beside those of a tier

    @model_validator(mode="after")
    def _reaches(self) -> "Attack":
        if self.steps * self.step < self.eps:
            raise ValueError(f"steps * step = {self.steps * self.step:.4g} cannot reach eps {self.eps:.4g}; raise step")
        return self


class Validation(Section):
    """Which test images `mpdsgr validate` uses, and the seed of its noise and random starts."""

    limit: Count | None = None  # only so many test images: the first in `data.images.in_sampling_order`
    batch_size: Count = 128
    seed: Seed = 0


def _decides(value: float) -> float:
    if value >= 1:
        raise ValueError("a limit of 1 would allow the loss of all accuracy; write 0.01 for 1 %")
    return value


Drop = Annotated[UnitInterval, AfterValidator(_decides)]  # a drop of accuracy as a share of the images
Floor = Annotated[Number, Field(gt=0, le=1)]


class Gate(Section):
    """What an artefact must keep to pass `mpdsgr validate`; shares of the images, in [0, 1]. See validation.gate.

    tier: how many images are attacked, and how hard (attacks.tiers). images: how many; None: as many as the tier takes.
    max_drop: largest loss of accuracy against the reference, in every condition but Square; None: the tier's. drops:
    the same for single conditions, Square too. floors: the least accuracy of single conditions; "worst" is the union of
    all attacks within eps.

    eps, images_sha256, least_images: the evaluation that the figures were chosen for; any other is refused.
    """

    tier: Literal["commit", "release", "paper"] = "commit"
    images: Count | None = None
    max_drop: Drop | None = None
    drops: dict[str, Drop] = Field(default_factory=dict)
    floors: dict[str, Floor] = Field(default_factory=dict)
    eps: Annotated[Number, Field(gt=0, le=1)] | None = None
    images_sha256: str | None = None
    least_images: Count | None = None


class Recipe(Section):
    """All sections; every one and every field has a default."""

    data: Data = Data()
    model: Model = Model()
    neuron: Neuron = Neuron()
    encoding: EncodingSection = EncodingSection()
    training: Training = Training()
    defence: dict[str, dict[str, Any]] = Field(default_factory=dict)  # name -> settings, which the defence checks
    attack: Attack = Attack()
    validation: Validation = Validation()
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _one_frame_a_step(self) -> "Recipe":
        T, frames = self.encoding.T, self.data.frames
        if self.encoding.name == "frames" and frames not in (None, T):
            raise ValueError(
                f"encoding 'frames' shows one frame per time step, but encoding.T is {T} and data.frames is {frames}; "
                "make them equal"
            )
        return self

    @model_validator(mode="after")
    def _tdbn_alone_is_synchronised(self) -> "Recipe":
        if self.training.sync_norm and self.model.norm != "tdbn":
            raise ValueError(
                f"training.sync_norm works only with model.norm 'tdbn', not {self.model.norm!r}; leave it out"
            )
        return self

    @property
    def method(self) -> str:
        """The training method as tables name it: REG, AT, MPD-SGR, AT + RAT."""
        return " + ".join(name.upper() for name in self.defence) or "REG"

    def portable(self) -> "Recipe":
        """Return the same recipe without machine-specific values: data.root is reset to its default."""
        return self.model_copy(update={"data": self.data.at(Data().root)})


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, whose values are TOML (a bare word is a string).

    A recipe may build on another: `extends = "NAME"` is that recipe, in the same folder, with this one's keys laid over
    it. Raises InputError for a missing or malformed file, an unknown key or a value out of range.
    """
    values = read_extended(path)
    values.pop("published", None)  # figures of a paper, for tables; see mpdsgr_deploy.recipes
    source = path.name
    if overrides:
        override(values, overrides, example="training.epochs=10")
        source = f"{source} with --set"
    return parse(Recipe, values, source)


def read_extended(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the values of a recipe file over those of the recipe it extends, without checking them."""
    if path in above:
        raise InputError(f"{path} extends itself through {', '.join(p.name for p in above)}")
    values = read_toml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or Path(base).name != base:
        raise InputError(f"{path}: extends must name a recipe in the same folder, got {base!r}")
    below = read_extended(path.with_name(f"{base}.toml"), (*above, path))
    below.pop("published", None)
    return _merge(below, values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two tables: if both have a key, `above` wins; nested tables are merged in the same way."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
