"""Compare two sides in everything that both have, and say why other parts are left out."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.pairs.network_pair import LayerPair, paired_networks
from mpdsgr_deploy.pairs.side import Side
from mpdsgr_deploy.pairs.verdicts import PairedVerdict, paired_verdicts
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.validation.report import ModelFacts

Curves = dict[str, tuple[list[Any], list[Any]]]  # the values per epoch of A and of B, by name


class Differences(NamedTuple):
    """The differences between A and B.

    settings: pairs of values that differ, by name; curves: what both trainings logged; layers: those of both networks
    on the images that `measured_on` describes; verdicts: recorded ones, or else clean ones on these images; left_out:
    the reason for each part that was left out.
    """

    settings: dict[str, tuple[Any, Any]]
    curves: Curves
    measured_on: str
    layers: list[LayerPair]
    verdicts: list[PairedVerdict]
    left_out: dict[str, str]


def compare(a: Side, b: Side, *, root: str | None = None, images: int = 128) -> Differences:
    """Compare what both sides have. root: the directory of the data set; images: the number on which networks run.

    A part that would raise InputError is left out.
    """
    left_out: dict[str, str] = {}

    def part(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except InputError as error:
            left_out[name] = str(error)
            return None

    curves = part("curves", lambda: training_curves(a, b)) or {}
    networks = part("spikes, membranes", lambda: paired_networks(a, b, root=root, images=images))
    verdicts, attacks_left_out = part("recorded verdicts", lambda: paired_verdicts(a, b, root)) or ([], "")
    if attacks_left_out:
        left_out["attacks"] = attacks_left_out
    if not verdicts and networks is not None and networks.clean is not None:
        verdicts = [networks.clean]
    where, layers = (networks.where, networks.layers) if networks else ("", [])
    return Differences(differing_settings(a, b), curves, where, layers, verdicts, left_out)


def training_curves(a: Side, b: Side) -> Curves:
    """Return the values per epoch that both trainings logged. Raises InputError for a side without a history."""
    for side in (a, b):
        if side.checkpoint is None or not side.checkpoint.history:
            raise InputError(f"{side.name} is a {side.kind}, which holds no training history")
    assert a.checkpoint is not None
    assert b.checkpoint is not None
    left, right = a.checkpoint.curve, b.checkpoint.curve
    return {name: (left[name], right[name]) for name in left if name in right}


def differing_settings(a: Side, b: Side) -> dict[str, tuple[Any, Any]]:
    """Return pairs of values that differ, by name. A recipe's are named `section.key`, and None on a side without them.

    If one side is a report, which has no recipe, the facts that both sides state are compared instead.
    """
    if a.recipe is not None and b.recipe is not None:
        left, right = (flattened(recipe) | network_facts(side) for recipe, side in ((a.recipe, a), (b.recipe, b)))
        names = [*left, *(name for name in right if name not in left)]
    else:
        left, right = stated_facts(a), stated_facts(b)
        names = [name for name in left if name in right]
    values = {name: (left.get(name), right.get(name)) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def flattened(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by `section.key`, without those that belong to one machine, such as paths."""
    return dict(_leaves(recipe.portable().model_dump(mode="json"), ""))


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def network_facts(side: Side) -> dict[str, Any]:
    """Return the facts about a network that its recipe does not state, by name."""
    if side.bundle is None:
        return {"epoch": side.checkpoint.epoch} if side.checkpoint else {}
    facts = ModelFacts.of(side.bundle, side.precision)
    return {
        "epoch": side.bundle.manifest.provenance.get("epoch"),
        "time steps trained with": side.bundle.manifest.trained_steps,
        "precision": side.precision,
        "parameters": facts.parameters,
        "multiply-accumulates": facts.macs,
    }


def stated_facts(side: Side) -> dict[str, Any]:
    """Return the facts that a side states, with the same names for reports and for sides with a recipe."""
    facts: dict[str, Any] = {}
    if side.report is not None:
        report, model = side.report, side.report.model
        facts = {"eps": report.eps, "precision": report.precision, "tier": report.tier, "suite": report.suite}
        facts |= {"backend": report.backend, "seed": report.seed, "images": report.images, "verdict": report.verdict}
    else:
        assert side.recipe is not None
        recipe = side.recipe
        model = None if side.bundle is None else ModelFacts.of(side.bundle, side.precision)
        facts = {"eps": recipe.attack.eps, "seed": recipe.validation.seed, "method": recipe.method}
        facts["time steps"] = recipe.encoding.T
        facts |= {"precision": side.precision} if side.precision else {}
    if model is not None:
        facts |= {"architecture": model.architecture, "method": model.method, "time steps": model.steps}
        facts |= {"parameters": model.parameters, "multiply-accumulates": model.macs}
    return facts
