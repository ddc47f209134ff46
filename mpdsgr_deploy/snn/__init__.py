"""Spiking building blocks. Shapes: T time steps, B batch, C channels; tensors are time-major [T, B, ...]."""

from mpdsgr_deploy.snn.encoding import ENCODINGS
from mpdsgr_deploy.snn.layer import Observer, SpikingLayer, Trace, fold_time
from mpdsgr_deploy.snn.neuron import LIF, LIFState, lif, lif_step
from mpdsgr_deploy.snn.surrogate import SURROGATES, Surrogate
from mpdsgr_deploy.snn.tdbn import TdBN

__all__ = [
    "ENCODINGS",
    "LIF",
    "SURROGATES",
    "LIFState",
    "Observer",
    "SpikingLayer",
    "Surrogate",
    "TdBN",
    "Trace",
    "fold_time",
    "lif",
    "lif_step",
]
