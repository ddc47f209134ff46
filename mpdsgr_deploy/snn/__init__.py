"""Spiking building blocks. Shapes: T time steps, B batch, C channels; tensors are time-major [T, B, ...]."""

from mpdsgr_deploy.snn.draws import Noise
from mpdsgr_deploy.snn.encoding import Encoding
from mpdsgr_deploy.snn.layer import Observer, Reader, SpikingLayer, Temporal, Trace, fold_time
from mpdsgr_deploy.snn.lif_state import LIFState
from mpdsgr_deploy.snn.neuron import LIF, DerivedLIF, lif, lif_step
from mpdsgr_deploy.snn.surrogate import Surrogate, make_surrogate
from mpdsgr_deploy.snn.tdbn import TdBN, frozen_statistics

__all__ = [
    "LIF",
    "DerivedLIF",
    "Encoding",
    "LIFState",
    "Noise",
    "Observer",
    "Reader",
    "SpikingLayer",
    "Surrogate",
    "TdBN",
    "Temporal",
    "Trace",
    "fold_time",
    "frozen_statistics",
    "lif",
    "lif_step",
    "make_surrogate",
]
