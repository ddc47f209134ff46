"""From a checkpoint to a deployment bundle."""

from mpdsgr_deploy.exporting.bundle_writer import export

__all__ = ["export"]
