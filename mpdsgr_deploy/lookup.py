"""Look up named choices and optional dependencies, with errors that say what to do."""

import difflib
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

from mpdsgr_deploy.errors import InputError

T = TypeVar("T")


def choose(kind: str, table: Mapping[str, T], name: str) -> T:
    """Return `table[name]`. Raises InputError with the allowed names, and the nearest one, if it is unknown.

    kind: what the error calls an entry of the table.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown {kind} {name!r}; allowed: {', '.join(sorted(table))}{hint}")


def need(module: str, extra: str) -> ModuleType:
    """Import and return an optional dependency. Raises InputError, which names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"this needs the package {package}, which could not be imported ({error}); install it with: pip "
            f"install 'mpdsgr-deploy[{extra}]'"
        ) from error
