"""mpdsgr-deploy: train robust spiking networks, export them, and prove the exported artefact is still robust."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpdsgr_deploy.api import export, open_bundle, open_predictor, predict, train, validate

# onnxruntime's wheels for Linux, and Ray, call home unless this is said before their first import; who wants it sets
# the variables the other way
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__version__ = "0.1.0"
__all__ = ["export", "open_bundle", "open_predictor", "predict", "train", "validate"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when first used: `import mpdsgr_deploy` alone loads nothing."""
    if name in __all__:
        return getattr(import_module("mpdsgr_deploy.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
