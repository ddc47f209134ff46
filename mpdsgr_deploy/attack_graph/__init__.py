"""The attack graph: an exported network with its losses and their gradient in the images, derived from its ONNX nodes.

    attack_graph(network, "triangle")             ModelProto to ModelProto; see there for inputs and outputs
    derived(path, "triangle")                     the same from a file, as the bytes of one
    derived_attack_graph(bundle, "fp32")          what the bundle's attack.fp32.onnx must be, byte by byte

Reverse-mode differentiation without torch: whoever holds model.P.onnx can derive attack.P.onnx again, byte by byte, so
that nobody has to trust the stored one. `mpdsgr_deploy.attack_graph.attacker.GraphAttacker` runs it.
"""

from mpdsgr_deploy.attack_graph.derive import attack_graph, derived
from mpdsgr_deploy.attack_graph.stored import derived_attack_graph

__all__ = [
    "attack_graph",
    "derived",
    "derived_attack_graph",
]
