"""Export a checkpoint, or any torch module, to a deployment bundle."""

from mpdsgr_deploy.exporting.bundle_writer import export
from mpdsgr_deploy.exporting.module import export_module
from mpdsgr_deploy.models.module_by_name import find_module

__all__ = ["export", "export_module", "find_module"]
