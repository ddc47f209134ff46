"""The vector-Jacobian product of each supported operator.

A rule `(tape, node, cotangents)` passes cotangents on to the node's inputs, computed from those of its outputs (None:
the output does not affect the loss). `mpdsgr_deploy.attack_graph.neurons` has the rules of discontinuous operators.
"""

from mpdsgr_deploy.attack_graph.rules import elementwise, normalisation, pooling, products, views
from mpdsgr_deploy.attack_graph.rules.common import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **normalisation.RULES,
    **pooling.RULES,
    **products.RULES,
    **views.RULES,
}
