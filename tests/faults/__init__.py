"""Bundles with planted faults: each must end in exit code 1, 2 or 3, whatever its hashes say.

artefact.py     the network itself is wrong, its attack graph and golden logits made to match
precisions.py   the same for the variants that other precisions have
runtime.py      the file is right, what runs it is not
gradients.py    the attack is led astray: stored attack graphs, and the evaluation's own gradients
attacks.py      the attacks' images break the rules
promise.py      figures, images and labels
"""

from faults import artefact, attacks, files, gradients, precisions, promise, runtime  # noqa: F401 - they fill FAULTS
from faults.networks import Networks
from faults.planted import FAULTS, Fault, InProcess, Outcome, Planted, Target, judge, plant

__all__ = ["FAULTS", "Fault", "InProcess", "Networks", "Outcome", "Planted", "Target", "judge", "plant"]
