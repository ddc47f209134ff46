"""Prove on the artefact that clean and attacked accuracy survived."""

from mpdsgr_deploy.validation.target import Target
from mpdsgr_deploy.validation.validate import validate

__all__ = ["Target", "validate"]
