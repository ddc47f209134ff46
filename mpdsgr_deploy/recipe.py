"""Recipes: typed TOML files that define a training run completely. An unknown key is an error.

Defaults are those of the SNN-RAT family of papers. Numbers such as eps may be written as fractions, "8/255".
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

# Surrogates that an attacker may use in place of the trained one; see mpdsgr_deploy.attacks.attacker_surrogate
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
    """The images, and how training augments them."""

    name: str = "cifar10"
    root: str = "data"  # the directory of the data set's files
    train_images: Count | None = None  # use only this many training images, a fixed random choice
    # share of the training images that is left out of training and used to validate each epoch
    validation_share: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    augment: Literal["none", "crop", "crop-flip"] = "crop-flip"
    crop_padding: Count = 4
    image_size: Count | None = None  # imagefolder only: the shorter side is resized to this, and the centre cropped
    frames: Count | None = None  # n-mnist only: number of frames of a recording; equal to T with encoding "frames"

    def at(self, root: str | None) -> "Data":
        """Return the same data set with its files in `root`; None keeps `self.root`."""
        return self if root is None else self.model_copy(update={"root": root})


class Model(Section):
    """The architecture. `mpdsgr_deploy.models.MODELS` has the names."""

    name: str = "vgg11"
    width: Annotated[Number, Field(gt=0, le=16)] = 1.0  # multiplies the number of channels of every layer
    norm: Literal["tdbn", "bn", "none"] = "tdbn"
    readout: Literal["mean", "membrane"] = "mean"  # of the last linear layer over time; see models.spiking_net


class Neuron(Section):
    """The LIF neuron and its surrogate gradient. See `mpdsgr_deploy.snn.neuron` and `mpdsgr_deploy.surrogates`."""

    tau: Annotated[Number, Field(gt=0, le=1)] = 0.5
    v_threshold: Positive = 1.0
    reset: Literal["hard", "soft"] = "hard"
    surrogate: str = "triangle"
    surrogate_parameter: Positive | None = None  # the surrogate's width; None: its default
    detach_reset: bool = False  # resets pass no gradient, as in snnTorch, and in SpikingJelly if chosen there


class EncodingSection(Section):
    """How an image becomes the input of T time steps. See `mpdsgr_deploy.snn.encoding`."""

    name: str = "direct"
    T: Count = 8
    std: NonNegative = 0.25  # rsc: standard deviation of the noise added to pixels in [0, 1]
    levels: Count = 2  # sqe: number of steps from a black to a white pixel; 1 is the same as poisson
    # frequency: the radius of the low-pass filter at each step; None: in equal steps down from half the image's side
    radii: Annotated[tuple[Count, ...], Field(strict=False)] | None = None


class Stage(Section):
    """A number of epochs at T time steps in place of encoding.T."""

    epochs: Count
    T: Count


class Training(Section):
    """SGD with a learning rate that falls to zero as a half cosine, and the devices that compute it."""

    epochs: Count = 300
    batch_size: Count = 64  # images per optimiser step, over all devices and accumulation steps
    accumulate: Count = 1  # forward passes per optimiser step
    lr: Positive = 0.1
    momentum: UnitInterval = 0.9
    weight_decay: NonNegative = 5e-4
    label_smoothing: UnitInterval = 0.0  # share of the cross-entropy's target that is spread evenly over all classes
    # the first epochs, at other T and in this order; the others run at encoding.T. See mpdsgr_deploy.training.stages
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    # decay per step of an exponential average of the weights, which is validated and saved in their place; 0: none
    average: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    nodes: Count = 1  # number of machines; see mpdsgr_deploy.training.launch
    devices: Count = 1  # devices per node; each normalises its own share of the batch, unless sync_norm is set
    sync_norm: bool = False  # compute tdBN's statistics over all devices; regularisers still see a device's own share
    # recompute layers in the backward pass instead of keeping their tensors
    recompute: Literal["none", "layers"] = "none"
    pictures: Annotated[int, Field(ge=0)] = 10  # epochs between pictures of membrane potentials in TensorBoard; 0: none
    attacked_images: Annotated[int, Field(ge=0)] = 0  # validation images that [attack]'s PGD attacks after each epoch
    seed: Seed = 0

    @property
    def processes(self) -> int:
        """The number of processes that train together, one per device of every node."""
        return self.nodes * self.devices

    @model_validator(mode="after")
    def _check_batch_size(self) -> "Training":
        parts = self.processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of nodes * devices * accumulate = {parts}"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> "Training":
        staged = sum(stage.epochs for stage in self.stages)
        if self.stages and staged >= self.epochs:
            raise ValueError(
                f"stages take {staged} epochs, so none of epochs = {self.epochs} is left for training at encoding.T; "
                "raise epochs or shorten stages"
            )
        return self


class Attack(Section):
    """The attacks of `mpdsgr validate`.

    Changes are within eps in the L-infinity norm, except for Gaussian noise, CW-L2, and attacks on events.
    """

    eps: Annotated[Number, Field(gt=0, le=1)] = 8 / 255
    steps: Count = 7  # number of steps of BIM and PGD in the paper's setting
    step: Positive = 0.01  # length of these steps
    strong_steps: Count = 40  # steps, of length eps/4, of strong PGD, which breaks an image if any iterate does
    surrogates: Annotated[tuple[str, ...], Field(strict=False)] = SWEEP  # strong PGD is repeated through each of these
    draws: Count = 8  # number of noise draws over which a stochastic network's gradient is averaged
    l2: Positive | None = None  # L2 distance within which CW-L2 attacks too; None: no CW-L2
    gaussian_std: NonNegative = 0.1  # standard deviation of Gaussian noise
    events: Count = 20  # largest number of events that an attack adds, removes or moves; see attacks.event_conditions
    also: Annotated[tuple[str, ...], Field(strict=False)] = ()  # registered attacks, made besides those of a tier

    @model_validator(mode="after")
    def _check_reach(self) -> "Attack":
        if self.steps * self.step < self.eps:
            raise ValueError(f"steps * step = {self.steps * self.step:.4g} cannot reach eps {self.eps:.4g}; raise step")
        return self


class Validation(Section):
    """The test images of `mpdsgr validate`, and the seed of its noise and random starts."""

    limit: Count | None = None  # number of test images, the first in `data.images.in_sampling_order`; None: all
    batch_size: Count = 128
    seed: Seed = 0


def _below_one(value: float) -> float:
    if value >= 1:
        raise ValueError("a limit of 1 would allow the loss of all accuracy; write 0.01 for 1 %")
    return value


Drop = Annotated[UnitInterval, AfterValidator(_below_one)]  # a drop of accuracy, in [0, 1)
Floor = Annotated[Number, Field(gt=0, le=1)]  # an accuracy, in (0, 1]


class Gate(Section):
    """What an artefact must keep to pass `mpdsgr validate`. See validation.gate.

    tier: how many images are attacked, and how hard (attacks.tiers). images: number of test images; None: the tier's.
    max_drop: largest drop of accuracy against the reference, in every condition but Square; None: the tier's. drops:
    the same for single conditions, which may include Square. floors: least accuracy in single conditions, where "worst"
    stands for all attacks within eps together.

    eps, images_sha256, least_images: the attack, the images and the least number of images for which these rules were
    chosen. An evaluation with others is refused.
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
    """A recipe: every section and every field has a default."""

    data: Data = Data()
    model: Model = Model()
    neuron: Neuron = Neuron()
    encoding: EncodingSection = EncodingSection()
    training: Training = Training()
    defence: dict[str, dict[str, Any]] = Field(default_factory=dict)  # settings by name, which the defence checks
    attack: Attack = Attack()
    validation: Validation = Validation()
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _check_frames(self) -> "Recipe":
        T, frames = self.encoding.T, self.data.frames
        if self.encoding.name == "frames" and frames not in (None, T):
            raise ValueError(
                f"encoding 'frames' shows one frame per time step, but encoding.T is {T} and data.frames is {frames}; "
                "make them equal"
            )
        return self

    @model_validator(mode="after")
    def _check_sync_norm(self) -> "Recipe":
        if self.training.sync_norm and self.model.norm != "tdbn":
            raise ValueError(
                f"training.sync_norm works only with model.norm 'tdbn', not {self.model.norm!r}; leave it out"
            )
        return self

    @property
    def method(self) -> str:
        """The training method as tables name it: REG without a defence, else the defences, as in AT + RAT.

        Encodings that change the image follow, as in AT + SQE, because they protect the network as a defence does.
        """
        changed = [] if self.encoding.name in ("direct", "frames") else [self.encoding.name]
        return " + ".join(name.upper() for name in [*(self.defence or ["REG"]), *changed])

    def portable(self) -> "Recipe":
        """Return the same recipe without what depends on the machine: data.root has its default."""
        return self.model_copy(update={"data": self.data.at(Data().root)})


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides `section.key=value`, whose values are TOML or a bare word.

    A recipe with `extends = "NAME"` has the values of that recipe, in the same folder, where it does not set its own.
    Raises InputError for a missing or malformed file, an unknown key or a value out of range.
    """
    values = read_extended(path)
    values.pop("published", None)  # figures of a paper; see mpdsgr_deploy.recipes
    source = path.name
    if overrides:
        override(values, overrides, example="training.epochs=10")
        source = f"{source} with --set"
    return parse(Recipe, values, source)


def read_extended(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a recipe file and of those that it extends, without checking them.

    above: the files that extend this one. Raises InputError for a file that cannot be read or that extends itself.
    """
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
    """Return both tables merged. For a key of both, `above` counts; nested tables are merged in the same way."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
