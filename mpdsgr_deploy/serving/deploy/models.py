"""The networks to deploy, each with its opened bundle."""

from collections.abc import Sequence
from typing import NamedTuple

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.demand import Demand
from mpdsgr_deploy.serving.source import NOTHING, sources


class Chosen(NamedTuple):
    """One precision of a bundle, with the name it is served by."""

    name: str
    bundle: Bundle
    precision: str


def choose_models(texts: Sequence[str], demand: Demand = NOTHING) -> list[Chosen]:
    """Open each `[NAME=]BUNDLE[@PRECISION]`. Raises InputError as `sources` and `demand` do."""
    chosen = [Chosen(source.name, demand.open(source.path), source.precision) for source in sources(texts)]
    for _, bundle, precision in chosen:
        bundle.variant(precision)
        demand.verdict(bundle, precision)
    return chosen
