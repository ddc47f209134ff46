"""The attack graph: an exported network with its losses and their gradient in the images, derived from its ONNX nodes.

    attack_graph(network, "triangle")             ModelProto to ModelProto; see there for inputs and outputs
    derived(path, "triangle")                     the same from a file, as the bytes of one

Reverse-mode differentiation without torch. It is a function of the ONNX file and the surrogate alone, so no bundle
stores it: whoever attacks a network derives it in memory. `mpdsgr_deploy.attack_graph.attacker.GraphAttacker` runs it,
`mpdsgr inspect --attack-graph` writes it as a file for other tools.
"""

from mpdsgr_deploy.attack_graph.derive import attack_graph, derived

__all__ = ["attack_graph", "derived"]
