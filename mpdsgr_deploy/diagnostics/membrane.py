"""A histogram of one layer's membrane potentials, as results store it."""

from pydantic import BaseModel

RANGE = (-4.5, 3.5)  # range of U - V_th in a histogram, half a unit wider on each side than the plots


class Membrane(BaseModel):
    """The share of a layer's membrane potentials, over all steps and channels, in each bin of v = U - V_th.

    The first bin begins at `start`, and all have the width `width`. half_width: half the width of the surrogate's
    window around v = 0.
    """

    layer: str
    half_width: float
    start: float
    width: float
    share: list[float]
