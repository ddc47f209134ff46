"""Training-time defences, one per file. Every file of this package is imported here and registers its defence."""

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
