"""Check that the artefact is the network that was exported: compare its logits with those in the bundle."""

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.parity import Parity, compare
from mpdsgr_deploy.reference import Reference

SAME_ROWS = 0.9  # share of images whose logits must agree to 1e-5; the others are single spikes, flipped by rounding
SAME_LABELS = 0.99


def check_answers(reference: Reference | None, precision: str, logits: NDArray[np.float32]) -> Parity | None:
    """Compare clean logits [N, K] with the stored ones; None for a precision whose rounding depends on the machine."""
    expected = reference.logits.get(precision) if reference else None
    if expected is None:
        return None
    common = min(len(expected), len(logits))
    return compare(expected[:common], logits[:common])


def answer_faults(parity: Parity | None) -> list[str]:
    """Return a fault if the logits differ by more than single flipped spikes, else None."""
    if parity is None:
        return []
    same = parity.within_tolerance >= SAME_ROWS * parity.rows
    labels = parity.labels_differ <= max(1, (1 - SAME_LABELS) * parity.rows)
    return [] if same and labels else [f"the artefact's answers differ from those of the exported network: {parity}"]
