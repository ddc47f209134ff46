"""The attack graph: an exported network with losses and their input gradients, derived from its ONNX nodes.

    attack_graph(network, "triangle")             ModelProto to ModelProto; its docstring lists inputs and outputs
    derived(path, "triangle")                     the same from a file, as serialised bytes

Reverse-mode differentiation without torch. It is a function of the ONNX file and the surrogate alone, so no bundle
stores it: an attack derives it in memory. `mpdsgr_deploy.attack_graph.attacker.GraphAttacker` runs it, `mpdsgr inspect
--attack-graph` writes it as a file for other tools.
"""

from mpdsgr_deploy.attack_graph.derive import attack_graph, derived

__all__ = ["attack_graph", "derived"]
