"""The attack graph: an exported network with losses and their input gradients, derived from its ONNX nodes.

    attack_graph(network, "triangle")             from ModelProto to ModelProto; its docstring lists inputs and outputs
    derived(path, "triangle")                     from a file to serialised bytes

The graph is built by reverse-mode differentiation, without torch. It depends only on the ONNX file and the surrogate,
so bundles do not store it: an attack derives it in memory. `mpdsgr_deploy.attack_graph.attacker.GraphAttacker` runs the
graph; `mpdsgr inspect --attack-graph` writes it to a file for other tools.
"""

from mpdsgr_deploy.attack_graph.derive import attack_graph, derived

__all__ = ["attack_graph", "derived"]
