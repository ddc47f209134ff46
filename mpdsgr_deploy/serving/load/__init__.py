"""Put load on a server of the Open Inference Protocol, in closed and open loops, and measure it."""

from mpdsgr_deploy.serving.load.load_measurement import LoadMeasurement, measure
from mpdsgr_deploy.serving.load.loops import Load
from mpdsgr_deploy.serving.load.outcome import LoadOutcome

__all__ = ["Load", "LoadMeasurement", "LoadOutcome", "measure"]
