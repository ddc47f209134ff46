"""Compare two sides in everything that both have, and say why a part was left out."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.pairs.networks import LayerPair, paired_networks
from mpdsgr_deploy.pairs.settings import differing_settings
from mpdsgr_deploy.pairs.side import Side
from mpdsgr_deploy.pairs.verdicts import PairedVerdict, paired_verdicts

Curves = dict[str, tuple[list[Any], list[Any]]]


class Differences(NamedTuple):
    """The differences between A and B. settings: values that differ; curves: values per epoch of what both trainings
    logged; layers: on the images that `measured_on` names; verdicts: recorded ones, else clean ones on these images.
    left_out: part to reason.
    """

    settings: dict[str, tuple[Any, Any]]
    curves: Curves
    measured_on: str
    layers: list[LayerPair]
    verdicts: list[PairedVerdict]
    left_out: dict[str, str]


def compare(a: Side, b: Side, *, root: str | None = None, images: int = 128) -> Differences:
    """Compare what both sides have. root: where the data set lies; images: on how many both networks run."""
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
    ours, theirs = a.checkpoint.curve, b.checkpoint.curve
    return {name: (ours[name], theirs[name]) for name in ours if name in theirs}
