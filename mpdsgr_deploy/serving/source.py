"""Parse the arguments `[NAME=]BUNDLE[@PRECISION]` of commands: a bundle, its precision, and a name to serve it by."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpdsgr_deploy.address import local_copy, parse_address
from mpdsgr_deploy.bundle import MANIFEST, Bundle
from mpdsgr_deploy.demand import Demand
from mpdsgr_deploy.errors import InputError

NOTHING = Demand()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class ModelSource(NamedTuple):
    """The name by which a model is served, its bundle's path and precision, and the signatures that are demanded."""

    name: str
    path: Path
    precision: str
    demand: Demand = NOTHING

    def on_disk(self) -> dict[str, Any]:
        """Return the members of the manifest on disk, which are not verified; {} if it cannot be read."""
        try:
            content = json.loads((self.path / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def sources(texts: Sequence[str], demand: Demand = NOTHING) -> list[ModelSource]:
    """Parse the arguments, in order, and fetch bundles that are not on this machine.

    Raises InputError for a name that URLs cannot contain or that appears twice, and for a bundle that cannot be
    fetched.
    """
    by_name: dict[str, ModelSource] = {}
    for text in texts:
        source = _source(text)
        if source.name in by_name:
            raise InputError(f"two models would be called {source.name!r}; write NAME=BUNDLE to rename one of them")
        by_name[source.name] = source._replace(demand=demand)
    return list(by_name.values())


def _source(text: str) -> ModelSource:
    """Parse one argument. The default name is that of the directory, followed by -PRECISION unless that is fp32."""
    name, place = "", text
    if "=" in text and not Path(text).exists():
        name, _, place = text.partition("=")
    address = parse_address(place)
    path, precision = local_copy(address), address.precision or "fp32"
    directory = Path(address.place).absolute().name  # a symbolic link gives its own name, not that of its target
    name = name or (directory if precision == "fp32" else f"{directory}-{precision}")
    if not NAME.fullmatch(name):
        raise InputError(
            f"{text!r}: {name!r} is not a valid model name (only letters, digits, _, . and -); write NAME={place}"
        )
    return ModelSource(name, path, precision)


class Chosen(NamedTuple):
    """One precision of an open bundle, and the name by which it is served."""

    name: str
    bundle: Bundle
    precision: str


def choose_models(texts: Sequence[str], demand: Demand = NOTHING) -> list[Chosen]:
    """Open the bundle of each `[NAME=]BUNDLE[@PRECISION]`.

    Raises InputError as `sources` does, for a precision that a bundle does not have, and if `demand` is not met.
    """
    chosen = [Chosen(source.name, demand.open(source.path), source.precision) for source in sources(texts)]
    for _, bundle, precision in chosen:
        bundle.variant(precision)
        demand.verdict(bundle, precision)
    return chosen
