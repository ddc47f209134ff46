"""Surrogates by name: "KIND" or "KIND:PARAMETER". What they compute: `snn.surrogate` in torch, `attack_graph` in ONNX.

Beside those of training there are the attacker's own: `straight-through` (gradient 1 everywhere), `rate` (rates only)
and `adaptive` (the width of every neuron follows its potentials).
"""

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import Neuron

STRAIGHT_THROUGH, RATE, ADAPTIVE = "straight-through", "rate", "adaptive"
# kind -> its parameter where a name gives none, and whether a larger one widens (1) or narrows (-1) the window
PARAMETERS = {"triangle": (1.0, 1), "rectangular": (1.0, 1), "sigmoid": (4.0, -1), "superspike": (10.0, -1)}
PARAMETERS |= {"exponential": (0.5, 1)}
NAMES = (*PARAMETERS, STRAIGHT_THROUGH, RATE, ADAPTIVE)


def parse(name: str) -> tuple[str, float]:
    """Kind and parameter; 1 for those that have none. Raises InputError for an unknown or malformed name."""
    kind, colon, text = name.partition(":")
    choose("attacker's surrogate", dict.fromkeys(NAMES), kind)
    default, _ = PARAMETERS.get(kind, (1.0, 1))
    try:
        parameter = float(text) if colon else default
    except ValueError:
        parameter = 0.0
    if not 0 < parameter < float("inf") or (colon and kind not in PARAMETERS):
        raise InputError(f"attacker's surrogate {name!r}: write KIND or KIND:NUMBER above 0, for example triangle:0.5")
    return kind, parameter


def trained(neuron: Neuron) -> str:
    """The name of the surrogate that a recipe's network was trained with."""
    kind, parameter = parse(neuron.surrogate)
    return f"{kind}:{neuron.surrogate_parameter or parameter:g}"


def scaled(name: str, factor: float) -> str:
    """The surrogate of `factor` times the width: "triangle:1" scaled by 0.25 is "triangle:0.25"."""
    kind, parameter = parse(name)
    return f"{kind}:{parameter * factor ** PARAMETERS[kind][1]:g}"
