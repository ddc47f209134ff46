"""Recipes: TOML files that say everything about a training run. Typed, closed, with errors that help.

Every field's default is the value METHOD of the SNN-RAT family uses unless its comment says otherwise.
Numbers such as eps may be written as fractions: "8/255".
"""

import tomllib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mpdsgr_deploy.errors import InputError


def _fraction(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            return value  # pydantic then says what a number looks like
    return value


Number = Annotated[float, BeforeValidator(_fraction), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
UnitInterval = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Which images, and how they are varied in training."""

    name: str = "cifar10"
    root: str = "data"  # where the data set's files lie
    train_images: Count | None = None  # use only so many training images (a fixed random choice)
    validation_share: Annotated[Number, Field(gt=0, lt=1)] = 0.1  # of the training images, for model selection
    augment: Literal["none", "crop", "crop-flip"] = "crop-flip"
    crop_padding: Count = 4
    image_size: Count | None = None  # imagefolder only: shorter side resized to this, centre cropped


class Model(Section):
    """Which architecture; `mpdsgr_deploy.models.MODELS` holds the names."""

    name: str = "vgg11"
    width: Positive = 1.0  # multiplies every layer's width


class Neuron(Section):
    """The LIF neuron and its surrogate gradient; see `mpdsgr_deploy.snn.neuron`."""

    tau: Annotated[Number, Field(gt=0, le=1)] = 0.5
    v_threshold: Positive = 1.0
    reset: Literal["hard", "soft"] = "hard"
    surrogate: str = "triangle"
    surrogate_parameter: Positive | None = None  # g, a, a or k; None: the surrogate's own default


class Encoding(Section):
    """How an image becomes T time steps."""

    name: str = "direct"
    T: Count = 8


class Training(Section):
    """SGD with a cosine schedule to zero, and where it runs."""

    epochs: Count = 300
    batch_size: Count = 64  # images per optimiser step, over all devices and accumulation steps
    accumulate: Count = 1  # forward passes per optimiser step
    lr: Positive = 0.1
    momentum: UnitInterval = 0.9
    weight_decay: NonNegative = 5e-4
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Count = 1
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _divides(self) -> "Training":
        parts = self.devices * self.accumulate
        if self.batch_size % parts:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of devices * accumulate = {parts}")
        return self


class Regularizer(Section):
    """MPD-SGR: loss = cross-entropy + eta * Omega; see `mpdsgr_deploy.mpd`."""

    name: Literal["none", "mpd-sgr"] = "none"
    estimator: str = "theorem"
    eta: NonNegative = 0.5  # unknown in print; sweep 0.1 .. 10


class Defence(Section):
    """`at`: adversarial training with PGD of these settings, random start."""

    name: Literal["none", "at"] = "none"
    eps: UnitInterval = 2 / 255
    steps: Count = 2
    step: Positive = 1 / 255


class Attack(Section):
    """The attacks of `mpdsgr validate`, all in the L-infinity ball of radius eps around pixels in [0, 1]."""

    eps: UnitInterval = 8 / 255
    steps: Count = 7  # BIM and PGD in the paper's setting
    step: Positive = 0.01
    strong_steps: Count = 40  # PGD with step eps/4; an image is broken once any iterate fools the model
    gaussian_std: NonNegative = 0.1


class Validation(Section):
    """Which test images `mpdsgr validate` uses, and the seed of its noise and random starts."""

    limit: Count | None = None  # only the first so many test images
    batch_size: Count = 128
    seed: Annotated[int, Field(ge=0)] = 0


class Recipe(Section):
    """All sections; every one and every field has a default."""

    data: Data = Data()
    model: Model = Model()
    neuron: Neuron = Neuron()
    encoding: Encoding = Encoding()
    training: Training = Training()
    regularizer: Regularizer = Regularizer()
    defence: Defence = Defence()
    attack: Attack = Attack()
    validation: Validation = Validation()

    @property
    def method(self) -> str:
        """How the network is trained, as tables name it: REG, MPD-SGR, AT, AT + MPD-SGR."""
        adversarial = "AT" if self.defence.name == "at" else ""
        config = self.regularizer
        pressure = f"MPD-SGR ({config.estimator}, eta {config.eta:g})" if config.name == "mpd-sgr" else ""
        return " + ".join(part for part in (adversarial, pressure) if part) or "REG"

    def portable(self) -> "Recipe":
        """The same without what belongs to one machine: data.root back to its default."""
        return self.model_copy(update={"data": self.data.model_copy(update={"root": Data().root})})


def parse(model: type[BaseModel], values: Any, source: str) -> Any:
    """Validate `values` as `model`; raise InputError with one line that names source, key and allowed values."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {'; '.join(_explain(model, e) for e in error.errors())}") from None


def _explain(model: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or "recipe"
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {key!r}; allowed here: {', '.join(section.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}, got {error['input']!r}" if path[1:] else f"{key}: {message}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides, whose values are TOML (a bare word is a string).

    Raises InputError for a missing or malformed file, an unknown key or a value out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    source = path.name
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, field = key.strip().partition(".")
        if not (equals and dot and section and field):
            raise InputError(f"--set {override!r}: write it as section.key=value, for example training.epochs=10")
        if not isinstance(values.setdefault(section, {}), dict):
            raise InputError(f"{source}: {section!r} must be a section")
        values[section][field] = _toml_value(text.strip())
        source = f"{path.name} with --set"
    return parse(Recipe, values, source)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
