"""Predictions for any number of inputs, written to a file as they are computed; an interrupted run can continue."""

from mpdsgr_deploy.prediction.stream import Job

__all__ = ["Job"]
