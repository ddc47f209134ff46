"""Find a torch module of any package by its name."""

import importlib
import sys
from pathlib import Path

from torch import nn

from mpdsgr_deploy.errors import InputError, one_line


def find_module(name: str) -> nn.Module:
    """Return the torch module that "package.module:attribute" names, or that the function of this name returns.

    Python modules of the working directory are found too: it is added to sys.path. Raises InputError for a name that
    cannot be imported or called, or does not give a torch module.
    """
    package, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        attribute_value = getattr(importlib.import_module(package), attribute)
        module = attribute_value if isinstance(attribute_value, nn.Module) else attribute_value()
    except Exception as error:  # code of another package may raise any type
        raise InputError(f"{name} cannot be imported and called: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{name} returns a {type(module).__name__}; name a torch module, or a function that returns one"
        )
    return module
