"""The base class of defences, which may change the model, the batch, the loss and the weights after a step.

A defence is a file of this package with a class derived from `Defence`, registered under a name. A recipe switches it
on by a table `[defence.NAME]` with its settings; several defences can be combined.
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
    """One training step, as an argument of a defence's loss term.

    forward: runs the network on other images in the same mode, precision and noise, so that outputs differ only because
        of the images. It leaves running statistics unchanged.
    x: the images [B, C, H, W] of the step, of classes y [B]. clean: the same images before an attack; x itself without
        an attack. logits [B, K]: the network's output for x.
    readings: the results of the defence's `read` for each layer in the pass on x, in order.
    epoch: counted from 0. draw: the generator for random choices.
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
    """A summand weight * value of the loss; the scalar `value` is logged as `name`, and `weight` as NAME_weight."""

    name: str
    weight: float
    value: Tensor


S = TypeVar("S", bound=Section)


class Defence(Generic[S]):
    """The base of all defences, whose methods change nothing. S: the schema of the defence's table in a recipe."""

    Settings: ClassVar[type[Section]]  # S, for parsing; set by `register`
    time_invariant: ClassVar[bool] = True  # whether all steps keep the same leak and input gain, as Theorem 1 assumes
    adversarial: ClassVar[bool] = False  # whether it trains on attacked images; tables group rows by this

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def check(self, recipe: Recipe) -> None:
        """Raise InputError if the recipe has settings that cannot be combined with this defence."""

    def adapt(self, model: SpikingNet, shapes: dict[str, Shape]) -> None:
        """Change a freshly built model. shapes: the shape [C, ...] of each layer's neurons, by the layer's name."""

    def undecayed(self, model: SpikingNet) -> list[nn.Parameter]:
        """Return the parameters without weight decay."""
        return []

    def examples(self, model: SpikingNet, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
        """Return the images to train on instead of x [B, C, H, W] in [0, 1]: attacked images, or x itself."""
        return x

    def read(self, trace: Trace) -> Any:
        """Return the values of a layer in the forward pass of a step that `term` needs; None for none.

        Traces are not stored, because they take most of a step's memory. May be called twice per layer, see `Reader`.
        """
        return None

    def term(self, step: Step) -> Term | None:
        """Return the summand that is added to the cross-entropy; None for none."""
        return None

    def after_step(self, model: SpikingNet, draw: torch.Generator) -> None:
        """Change the weights after the optimiser's step."""

    def begin_epoch(self, history: list[dict[str, Any]]) -> None:
        """Prepare an epoch from the log entries of earlier epochs, the only state that a resumed run restores."""


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
    """Return a class decorator that makes a defence available to recipes as the table [defence.NAME] of a schema."""

    def add(defence: D) -> D:
        defence.Settings = settings
        DEFENCES.add(name, defence)
        return defence

    return add


def make_defences(recipe: Recipe) -> list[AnyDefence]:
    """Return the defences that a recipe switches on. Raises InputError for a wrong name, setting or combination."""
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
    """Replace the neuron of every spiking layer by the result of `derive`.

    Raises InputError if another defence has replaced the neurons already, because its change would be lost.
    """
    for layer in model.layers():
        if type(layer.neuron) is not LIF:
            raise InputError(
                "two defences replace the neurons, and the second would undo the first; remove one of them"
            )
        layer.neuron = derive(layer)


def neuron_shapes(model: SpikingNet, shape: tuple[int, int, int]) -> dict[str, Shape]:
    """Return the shape [C, ...] of each spiking layer's neurons, by the layer's name, from a pass on a zero image.

    Raises InputError if two layers have the same name.
    """
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
