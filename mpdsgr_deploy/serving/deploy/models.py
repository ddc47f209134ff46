"""Which networks of which bundles are served, and by what names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Chosen(NamedTuple):
    """One precision of a bundle under the name it is served by."""

    name: str
    bundle: Bundle
    precision: str


def choose_models(bundles: Sequence[Path], precisions: Sequence[str]) -> list[Chosen]:
    """Every precision of every bundle, named as its directory, with `-PRECISION` behind it but for fp32.

    Raises InputError for no precision, for what is no bundle, for a precision it lacks, for a name that a URL does not
    take or that two would have.
    """
    if not precisions:
        raise InputError("no precision was chosen; write for example --precision fp32,int8")
    chosen: dict[str, Chosen] = {}
    for path in bundles:
        bundle = open_bundle(path)
        for precision in dict.fromkeys(precisions):
            bundle.variant(precision)
            directory = path.resolve().name
            name = directory if precision == "fp32" else f"{directory}-{precision}"
            if not NAME.fullmatch(name):
                raise InputError(f"{name!r} cannot name a model (letters, digits, _ . - only); rename {path}")
            if name in chosen:
                raise InputError(f"two models would be called {name!r}; rename one of the bundles' directories")
            chosen[name] = Chosen(name, bundle, precision)
    return list(chosen.values())
