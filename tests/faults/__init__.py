"""Bundles with planted faults: each must end in exit code 1, 2 or 3, whatever its hashes say.

artefact.py     the network itself is wrong, its golden logits made to match
precisions.py   the same for the variants that other precisions have
runtime.py      the file is right, what runs it is not
branches.py     parts put into a network that is right otherwise: decoys, triggers, control flow
gradients.py    the attack is led astray: the evaluation's own gradients
attacks.py      the attacks' images break the rules
promise.py      figures and files
images.py       images, classes and their names
unseen.py       what no validation can see, by design: it ends in exit code 0
"""

from faults import artefact, attacks, branches, files, gradients, images, precisions, promise, runtime  # noqa: F401
from faults import unseen as _unseen  # noqa: F401 - all of them fill FAULTS or UNSEEN
from faults.networks import Networks
from faults.planted import FAULTS, UNSEEN, Fault, InProcess, Outcome, Planted, Target, judge, plant

__all__ = ["FAULTS", "UNSEEN", "Fault", "InProcess", "Networks", "Outcome", "Planted", "Target", "judge", "plant"]
