"""The vector-Jacobian product of each supported operator.

A rule `(tape, node, cotangents)` gives the node's inputs their cotangents, from those of its outputs (None: that output
does not reach the loss). Discontinuous operators have no rule here: see `mpdsgr_deploy.attack_graph.neurons`.
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
