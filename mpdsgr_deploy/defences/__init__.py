"""Training-time defences, one a file; every file of this package registers itself."""

import importlib
import pkgutil

from mpdsgr_deploy.defences.base import (
    DEFENCES,
    AnyDefence,
    Defence,
    Step,
    Term,
    build_defended,
    make_defences,
    resolved,
)

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["DEFENCES", "AnyDefence", "Defence", "Step", "Term", "build_defended", "make_defences", "resolved"]
