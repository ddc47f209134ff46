"""A layer's membrane potentials as a histogram that can be written to a file and drawn."""

from pydantic import BaseModel

RANGE = (-4.5, 3.5)  # range of U - V_th in a histogram: that of the plots, and a little more


class Membrane(BaseModel):
    """A layer's membrane potentials over all steps and channels: the share of them in each bin of v = U - V_th.

    The first bin begins at `start`; all are `width` wide. half_width: of the surrogate's window around v = 0.
    """

    layer: str
    half_width: float
    start: float
    width: float
    share: list[float]
