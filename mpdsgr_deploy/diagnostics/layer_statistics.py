"""Statistics of each layer, and warnings about them."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# Undefended networks fire at 0.1 to 0.2. A tenth of that is about one spike per neuron in ten images at T = 8.
SILENT_RATE = 0.01
# Some channels are silent in any trained network, more in wide layers. With half of them silent, a layer acts as one of
# half the width.
SILENT_CHANNELS = 0.5
# A neuron that fires at nearly every step carries as little information as one that never fires.
SATURATED_RATE = 0.9
# lambda starts at 1. At 2, potentials spread twice as far, so about half as many lie in a window of the same width.
INFLATED_SCALE = 2.0
# The gap is about 0.01 for input that is independent over time, and 0.10 for constant input at tau 0.5 (the first layer
# under direct encoding).
THEOREM_GAP = 0.15


class LayerStatistics(NamedTuple):
    """Statistics of one layer over all its neurons, steps and images.

    firing_rate: spikes per neuron and step. in_window: share of potentials with |U - V_th| below the half-width of the
    surrogate's window. omega_theorem, omega_empirical: estimates of `in_window` by Theorem 1 and by measured moments.
    omega_theorem is None for a layer that Theorem 1 does not describe. scale: mean |lambda| of tdBN, None without tdBN.
    silent_channels: share of channels that never fired; None in runs that did not record it.
    """

    layer: str
    firing_rate: float
    in_window: float
    omega_theorem: float | None
    omega_empirical: float
    scale: float | None
    silent_channels: float | None = None


class Concern(NamedTuple):
    """A possible fault of a layer. It is present if `worries` holds for `value` of the layer's statistics."""

    value: Callable[[LayerStatistics], float | None]
    worries: Callable[[float], bool]
    message: str


CONCERNS = (
    Concern(
        lambda s: s.firing_rate,
        lambda rate: rate < SILENT_RATE,
        f"firing rate below {SILENT_RATE:g}: a silent layer passes on neither signal nor gradient, and a network "
        "that an attack cannot differentiate only looks robust; lower the regulariser's weight or the learning "
        "rate",
    ),
    Concern(
        lambda s: s.silent_channels,
        lambda share: share > SILENT_CHANNELS,
        f"more than {SILENT_CHANNELS:.0%} of the channels never fired, so the layer has fewer useful channels "
        "than it seems; lower the regulariser's weight or the weight decay, or choose a smaller model.width",
    ),
    Concern(
        lambda s: s.firing_rate,
        lambda rate: rate > SATURATED_RATE,
        f"firing rate above {SATURATED_RATE:g}: neurons that always fire distinguish inputs as little as silent "
        "ones; raise neuron.v_threshold or lower the learning rate",
    ),
    Concern(
        lambda s: s.scale,
        lambda scale: scale > INFLATED_SCALE,
        f"mean |lambda| above {INFLATED_SCALE:g} (it starts at 1): the membrane potentials are so large that the "
        "surrogate's window is narrow beside them, which masks gradients without making the network robust; "
        "attack with wider surrogates, lower the regulariser's weight or raise the weight decay",
    ),
    Concern(
        lambda s: None if s.omega_theorem is None else abs(s.omega_theorem - s.in_window),
        lambda gap: gap > THEOREM_GAP,
        f"Omega by Theorem 1 differs by more than {THEOREM_GAP:g} from the counted share: the layer's input is "
        "not independent from step to step, so the theorem's Gaussian does not describe it; train with "
        "defence.mpd-sgr.estimator = 'empirical'",
    ),
)


def warnings_of(statistics: Sequence[LayerStatistics], before: Iterable[LayerStatistics] = ()) -> list[str]:
    """Return a line for each concern that some layer has: these layers, their values, the meaning, and what to do.

    before: statistics of an earlier epoch; layers that already had the concern are left out.
    """
    earlier = list(before)
    lines = []
    for concern in CONCERNS:
        known = worried(concern, earlier)
        values = {layer: value for layer, value in worried(concern, statistics).items() if layer not in known}
        if values:
            lines.append(f"{', '.join(f'{layer} ({value:.3g})' for layer, value in values.items())}: {concern.message}")
    return lines


def worried(concern: Concern, statistics: Iterable[LayerStatistics]) -> dict[str, float]:
    """Return the values that raise a concern, by layer."""
    values = {layer.layer: concern.value(layer) for layer in statistics}
    return {layer: value for layer, value in values.items() if value is not None and concern.worries(value)}
