"""A torch module of any package by its name."""

import importlib
import sys
from pathlib import Path

from torch import nn

from mpdsgr_deploy.errors import InputError, one_line


def find_module(name: str) -> nn.Module:
    """The module that "package.module:attribute" names: itself, or what that function returns without arguments.

    Modules of the working directory are found too. Raises InputError for what cannot be imported and for what is not a
    torch module.
    """
    package, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        attribute_value = getattr(importlib.import_module(package), attribute)
        made = attribute_value if isinstance(attribute_value, nn.Module) else attribute_value()
    except Exception as error:  # whatever the other package's code raises
        raise InputError(f"{name} cannot be imported and called: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} gives a {type(made).__name__}; give a torch module, or a function that returns one")
    return made
