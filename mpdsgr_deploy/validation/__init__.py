"""Validate an exported network: measure its clean and attacked accuracy, and decide by the gate."""

from mpdsgr_deploy.validation.target import Target
from mpdsgr_deploy.validation.validate import validate

__all__ = ["Target", "validate"]
