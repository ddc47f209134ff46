"""The networks that are deployed, each with its opened bundle."""

from collections.abc import Sequence
from typing import NamedTuple

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.serving.source import sources


class Chosen(NamedTuple):
    """One precision of a bundle under the name it is served by."""

    name: str
    bundle: Bundle
    precision: str


def choose_models(texts: Sequence[str]) -> list[Chosen]:
    """What `[NAME=]BUNDLE[@PRECISION]` each name. Raises InputError as `sources` and `open_bundle` do."""
    chosen = [Chosen(source.name, open_bundle(source.path), source.precision) for source in sources(texts)]
    for _, bundle, precision in chosen:
        bundle.variant(precision)
    return chosen
