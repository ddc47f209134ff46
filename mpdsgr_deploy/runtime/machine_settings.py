"""A backend's settings for a network on one kind of machine, measured by `mpdsgr build` and kept in the bundle."""

from typing import Any

from pydantic import Field

from mpdsgr_deploy.bundle import Bundle, Prepared
from mpdsgr_deploy.provenance import hardware, package_version
from mpdsgr_deploy.schema import Count, Section, parse

PACKAGES = {"openvino": "openvino", "onnxruntime-cpu": "onnxruntime"}  # the backends that have settings


class RuntimeSettings(Section):
    """The settings of a backend for one network.

    threads: those of one inference; None: one per core. chunk: images computed at once; None: the backend's choice.
    milliseconds: the time of a batch measured when these settings were chosen, by batch size, for information only.
    """

    threads: Count | None = None
    chunk: Count | None = None
    milliseconds: dict[str, float] = Field(default_factory=dict)


def machine(backend: str) -> dict[str, str]:
    """Return what the settings of a backend depend on: the CPU, this process's cores, and the library's version."""
    facts, package = hardware(), PACKAGES[backend]
    return {"cpu": facts["cpu"], "cores": str(facts["cores"]), package: package_version(package) or "unknown"}


def prepared_settings(bundle: Bundle, backend: str, precision: str) -> RuntimeSettings:
    """Return the bundle's settings for this network on a machine like this one; without any, the defaults.

    Raises InputError if the bundle's entry does not hold such settings.
    """
    this_machine, network = machine(backend), bundle.model_sha256(precision)
    for prepared in bundle.prepared(backend, precision):
        if prepared.machine == this_machine and prepared.model_sha256 == network:
            source = f"{bundle.path}: settings of {backend}, {precision}"
            return parse(RuntimeSettings, prepared.settings, source)
    return RuntimeSettings()


def prepared(bundle: Bundle, backend: str, precision: str, settings: RuntimeSettings) -> Prepared:
    """Return the manifest entry of settings that were measured on this machine."""
    values: dict[str, Any] = settings.model_dump(exclude_none=True)
    return Prepared(
        backend=backend,
        precision=precision,
        model_sha256=bundle.model_sha256(precision),
        machine=machine(backend),
        settings=values,
    )
