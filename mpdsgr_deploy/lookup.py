"""Named choices (models, surrogates, data sets, backends): one look-up with one helpful error."""

import difflib
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from mpdsgr_deploy.errors import InputError

T = TypeVar("T")


def choose(kind: str, table: Mapping[str, T], name: str) -> T:
    """Return `table[name]`; raise `InputError` naming the allowed values and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown {kind} {name!r}; allowed: {', '.join(sorted(table))}{hint}")


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; raise `InputError` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"this needs the package {package}, which could not be imported ({error}); install it with: pip "
            f"install 'mpdsgr-deploy[{extra}]'"
        ) from error
