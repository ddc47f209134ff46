"""Load on a running server of the Open Inference Protocol: closed and open loops, and what they measure."""

from mpdsgr_deploy.serving.load.loops import Load
from mpdsgr_deploy.serving.load.measure import LoadMeasurement, measure
from mpdsgr_deploy.serving.load.outcome import LoadOutcome

__all__ = ["Load", "LoadMeasurement", "LoadOutcome", "measure"]
