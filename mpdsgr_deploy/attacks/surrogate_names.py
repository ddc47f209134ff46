"""A network's surrogate by name, and others of the same kind. Names are those of `attack_graph.surrogates`."""

from mpdsgr_deploy.attack_graph import parse_surrogate
from mpdsgr_deploy.recipe import Neuron

NARROWS = {"sigmoid", "superspike"}  # the larger their parameter, the narrower their window


def trained(neuron: Neuron) -> str:
    """The name of the surrogate that a recipe's network is trained with. Raises InputError for an unknown one."""
    kind, width = parse_surrogate(neuron.surrogate)
    return f"{kind}:{neuron.surrogate_parameter or width:g}"


def scaled(name: str, factor: float) -> str:
    """The surrogate with a window `factor` times as wide: "triangle:1" scaled by 0.25 is "triangle:0.25"."""
    kind, width = parse_surrogate(name)
    return f"{kind}:{width / factor if kind in NARROWS else width * factor:g}"
