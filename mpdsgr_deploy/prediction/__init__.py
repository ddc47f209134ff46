"""Inputs of any size through a bundle to a file: read, inferred and written at once, and continued after a kill."""

from mpdsgr_deploy.prediction.stream import Job

__all__ = ["Job"]
