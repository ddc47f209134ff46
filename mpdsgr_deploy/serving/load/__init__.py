"""Put load on a server of the Open Inference Protocol, in closed and open loops, and measure it."""

from mpdsgr_deploy.serving.load.load_measurement import LoadMeasurement, LoadOutcome, measure
from mpdsgr_deploy.serving.load.loops import Load

__all__ = ["Load", "LoadMeasurement", "LoadOutcome", "measure"]
