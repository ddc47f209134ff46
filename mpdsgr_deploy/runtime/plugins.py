"""Providers of onnxruntime that are installed as separate wheels beside its CPU package.

By its packaging guide such a wheel holds a module onnxruntime_ep_NAME with `get_library_path`, and `get_ep_names` or
`get_ep_name`. `get_available_providers` does not list such providers; `get_ep_devices` does, once registered.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mpdsgr_deploy.errors import one_line
from mpdsgr_deploy.progress import log

PREFIX = "onnxruntime_ep_"
# The same provider under the name that its first plug-in builds gave it
NAMES = {"CUDAExecutionProvider": ("CUDAExecutionProvider", "CudaPluginExecutionProvider")}


def plugin_devices(ort: Any, provider: str) -> list[Any]:
    """Return the devices of this provider's first installed plug-in; empty without one. ort: onnxruntime."""
    names = NAMES.get(provider, (provider,))
    for module in (name for _, name, _ in iter_modules() if name.startswith(PREFIX)):
        _register(ort, module)
    devices: list[Any] = getattr(ort, "get_ep_devices", list)()  # of onnxruntime 1.23 and later
    by_name = ([device for device in devices if device.ep_name == name] for name in names)
    return next(filter(None, by_name), [])


@cache
def _register(ort: Any, module: str) -> None:
    """Let onnxruntime load a plug-in's library, once per process; log a warning if it cannot."""
    try:
        plugin = import_module(module)
        ort.register_execution_provider_library(module, plugin.get_library_path())
    except Exception as error:  # whatever a half-installed plug-in raises; the provider is then missing
        log.warning("the onnxruntime plug-in %s cannot be used: %s", module, one_line(error))
