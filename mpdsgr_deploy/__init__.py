"""mpdsgr-deploy: train robust spiking networks, export them, and prove the exported artefact is still robust."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpdsgr_deploy.api import adopt, export, export_module, open_bundle, open_predictor, predict, train, validate

# Ray, OpenVINO and onnxruntime's wheels for Linux send usage statistics unless this is set before their first import
if os.environ.get("MPDSGR_TELEMETRY") != "1":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO works without this package

__version__ = "0.1.0"
__all__ = ["adopt", "export", "export_module", "open_bundle", "open_predictor", "predict", "train", "validate"]


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used, so that `import mpdsgr_deploy` alone loads nothing."""
    if name in __all__:
        return getattr(import_module("mpdsgr_deploy.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
