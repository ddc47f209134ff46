"""Statistics of each layer, and warnings about them."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# Undefended networks fire at 0.1 to 0.2; a tenth of that is about one spike per neuron in ten images of T = 8.
SILENT_RATE = 0.01
# Some channels are silent in any trained network, more so in wide layers; half of them is a layer half as wide.
SILENT_CHANNELS = 0.5
# A neuron that fires at nearly every step carries as little information as one that never fires.
SATURATED_RATE = 0.9
# lambda starts at 1. At twice that the potentials spread twice as far and about half as many lie in the same window.
INFLATED_SCALE = 2.0
# Independent input leaves a gap of 0.01, constant input at tau 0.5 (a first layer under direct encoding) one of 0.10.
THEOREM_GAP = 0.15


class LayerStatistics(NamedTuple):
    """How one layer's membrane stands to the surrogate's window, over all its neurons, steps and images.

    `firing_rate` and `in_window` (|U - V_th| < half-width) are counted; the two Omegas are estimates of `in_window`;
    `scale` is the mean |lambda|. Those that need tdBN are None without it. `silent_channels` is the share of channels
    that never fired; None in runs recorded before it was counted.
    """

    layer: str
    firing_rate: float
    in_window: float
    omega_theorem: float | None
    omega_empirical: float
    scale: float | None
    silent_channels: float | None = None


class Concern(NamedTuple):
    """A fault of a layer, present if `value` of its statistics is in the range that `worries`."""

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
    """Return one line per concern: the layers that have it, with their values, what it means and what to do.

    before: statistics of an earlier epoch; a layer that had the same concern then is not named again.
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
    """Return the layers that have a concern, with the value that raises it."""
    values = {layer.layer: concern.value(layer) for layer in statistics}
    return {layer: value for layer, value in values.items() if value is not None and concern.worries(value)}
