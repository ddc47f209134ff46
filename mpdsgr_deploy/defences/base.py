"""What a defence may add to training: to the model, to the batch, to the loss, after the step, between epochs.

A defence is one file in this package: a class derived from `Defence`, registered under its name. A recipe switches it
on with a table `[defence.NAME]` of its settings; several tables combine.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.registry import Expected, Registry
from mpdsgr_deploy.schema import Section, parse
from mpdsgr_deploy.snn import LIF, Observer, SpikingLayer, Trace

Shape = tuple[int, ...]


class Step(NamedTuple):
    """One training step as a defence's loss sees it.

    `x` are the images the step trains on [B, C, H, W], `clean` the same before any attack (x itself if there is none),
    `logits` [B, K] the network's output for x, and `readings` what the defence read of each layer in that pass, in
    order. `forward` runs the network on other images in the same mode, precision and noise, so that outputs differ by
    the images alone; it leaves the running statistics unchanged.
    """

    forward: Callable[[Tensor, Observer | None], Tensor]
    x: Tensor
    y: Tensor
    clean: Tensor
    logits: Tensor
    readings: list[Any]
    epoch: int
    draw: torch.Generator


class Term(NamedTuple):
    """A summand of the loss, weight * value; `value` (a scalar) is logged under `name`, `weight` under NAME_weight."""

    name: str
    weight: float
    value: Tensor


S = TypeVar("S", bound=Section)


class Defence(Generic[S]):
    """The base of all defences, which changes nothing. S is the schema of its table in a recipe."""

    Settings: ClassVar[type[Section]]  # S again, for parsing; `register` sets it
    time_invariant: ClassVar[bool] = True  # leaves every step the same leak and input gain, as Theorem 1 assumes
    adversarial: ClassVar[bool] = False  # trains on attacked images; tables group rows by it

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def check(self, recipe: Recipe) -> None:
        """Raise InputError if this recipe combines what cannot be combined."""

    def adapt(self, model: SpikingNet, shapes: dict[str, Shape]) -> None:
        """Change a freshly built model. `shapes` has each spiking layer's neurons [C, ...] by the layer's name."""

    def undecayed(self, model: SpikingNet) -> list[nn.Parameter]:
        """The parameters that the optimiser's weight decay leaves alone."""
        return []

    def examples(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        """Return the images to train on in place of x [B, C, H, W] in [0, 1]: x itself unless the defence attacks."""
        return x

    def read(self, trace: Trace) -> Any:
        """Return what `term` needs of a layer in the step's forward pass; None if it needs nothing.

        Traces themselves are not kept, because they are most of a step's memory. May be called twice, see `Reader`.
        """
        return None

    def term(self, step: Step) -> Term | None:
        """Return what is added to the cross-entropy; None for nothing."""
        return None

    def after_step(self, model: SpikingNet, draw: torch.Generator) -> None:
        """Change the weights after the optimiser's step."""

    def begin_epoch(self, history: list[dict[str, Any]]) -> None:
        """Prepare an epoch, given the log entries of those before it: the only state that a resumed run restores."""


AnyDefence = Defence[Any]
DEFENCES: Registry[type[AnyDefence]] = Registry(
    "defence",
    "mpdsgr_deploy.defences",
    expected=Expected(
        "a class derived from Defence that has a Settings class",
        lambda entry: isinstance(entry, type) and issubclass(entry, Defence) and hasattr(entry, "Settings"),
    ),
)
D = TypeVar("D", bound=type[AnyDefence])


def register(name: str, settings: type[Section]) -> Callable[[D], D]:
    """Class decorator: make a defence available to recipes as the table [defence.NAME] of that schema."""

    def add(defence: D) -> D:
        defence.Settings = settings
        DEFENCES.add(name, defence)
        return defence

    return add


def make_defences(recipe: Recipe) -> list[AnyDefence]:
    """Make the defences that a recipe switches on. Raises InputError for a wrong name, setting or combination."""
    defences = []
    kinds = {name: DEFENCES.choose(name) for name in recipe.defence}
    for name, values in recipe.defence.items():
        kind = kinds[name]
        defence = kind(parse(kind.Settings, values, f"[defence.{name}]"))
        defence.check(recipe)
        defences.append(defence)
    return defences


def resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with all settings of its defences written out. Raises InputError as `make_defences` does."""
    defences = zip(recipe.defence, make_defences(recipe), strict=True)
    return recipe.model_copy(update={"defence": {name: d.settings.model_dump(mode="json") for name, d in defences}})


def build_defended(recipe: Recipe, shape: tuple[int, int, int], classes: int) -> tuple[SpikingNet, list[AnyDefence]]:
    """Build the untrained model of a recipe, changed by its defences, and return both.

    Raises InputError as `build_model` and `make_defences` do.
    """
    defences = make_defences(recipe)
    model = build_model(recipe, shape, classes)
    shapes = neuron_shapes(model, shape)
    for defence in defences:
        defence.adapt(model, shapes)
    return model, defences


def replace_neurons(model: SpikingNet, derive: Callable[[SpikingLayer], LIF]) -> None:
    """Give every spiking layer the neuron that `derive` makes for it.

    Raises InputError if another defence has replaced them already: of two that change the neurons one would be lost.
    """
    for layer in model.layers():
        if type(layer.neuron) is not LIF:
            raise InputError(
                "two defences replace the neurons, and the second would undo the first; remove one of them"
            )
        layer.neuron = derive(layer)


def neuron_shapes(model: SpikingNet, shape: tuple[int, int, int]) -> dict[str, Shape]:
    """Return the shape [C, ...] of each spiking layer's neurons by name, measured with a blank image."""
    shapes: dict[str, Shape] = {}

    def observe(trace: Trace) -> None:
        if trace.layer in shapes:
            raise InputError(f"two layers of the model are called {trace.layer!r}; give each another name")
        shapes[trace.layer] = tuple(trace.states[0].u.shape[1:])

    was_training = model.training
    model.eval()
    with torch.no_grad():
        device = next(model.parameters()).device
        model(torch.zeros(1, *shape, device=device), observe, torch.Generator())
    model.train(was_training)
    return shapes
