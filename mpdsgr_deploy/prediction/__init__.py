"""Predictions for inputs of any size, written to a file as they are made; a killed run continues where it stopped."""

from mpdsgr_deploy.prediction.stream import Job

__all__ = ["Job"]
