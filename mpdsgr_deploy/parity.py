"""Decide whether two sets of logits agree, for export, for the golden check and for validation."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.reference import Reference

TOLERANCE = 1e-5  # difference of logits that float32 rounding alone can cause
MINIMUM_SHARE = 0.95  # share of rows that must agree within TOLERANCE, in `Parity.holds`
SAME_ROWS = 0.9  # share of rows that must agree within TOLERANCE, in `answer_faults`
SAME_LABELS = 0.99  # share of rows whose predicted classes must be equal, in `answer_faults`


class Parity(BaseModel):
    """The comparison of two sets of logits, row by row.

    rows: number of images. max_abs: largest difference of two logits. within_tolerance: number of images whose logits
    all differ by TOLERANCE at most. labels_differ: number of images with different predictions.

    A spiking network is discontinuous: if a membrane potential is nearer to the threshold than rounding moves it, a
    spike flips and the image's logits change visibly. Two correct float32 implementations therefore agree within
    TOLERANCE on nearly all images, but not on all, and chance decides about `max_abs`.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON itself has no infinity

    rows: int
    max_abs: float
    within_tolerance: int
    labels_differ: int

    @property
    def holds(self) -> bool:
        """Whether all predictions are equal and 95 % of the rows agree within TOLERANCE; False without rows."""
        return self.rows > 0 and not self.labels_differ and self.within_tolerance >= MINIMUM_SHARE * self.rows

    def __str__(self) -> str:
        return (
            f"{self.rows - self.labels_differ} of {self.rows} labels equal, {self.within_tolerance} rows within "
            f"{TOLERANCE:g}, largest difference {self.max_abs:.2g}"
        )


def compare(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Parity:
    """Compare logits [N, K] with a reference [N, K]. A difference that is not finite counts as infinite."""
    difference = np.abs(reference.astype(np.float64) - logits).max(axis=1, initial=0)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    return Parity(
        rows=len(reference),
        max_abs=float(difference.max(initial=0)),
        within_tolerance=int((difference <= TOLERANCE).sum()),
        labels_differ=int((reference.argmax(1) != logits.argmax(1)).sum()),
    )


def in_batches(network: Predictor, x: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Return the logits [n, K] of images x [n, C, H, W], computed in batches of these sizes, whose sum is at least n.

    Comparing them shows whether an image's logits depend on the other images of its batch.
    """
    bounds = np.cumsum((0, *sizes))
    return np.concatenate([network(x[a:b]) for a, b in pairwise(bounds) if a < len(x)])


def check_answers(reference: Reference | None, precision: str, logits: NDArray[np.float32]) -> Parity | None:
    """Compare logits [N, K] of the first clean images with those that the reference stores for a precision.

    None if it stores none, as for a precision whose rounding depends on the machine.
    """
    expected = reference.logits.get(precision) if reference else None
    if expected is None:
        return None
    common = min(len(expected), len(logits))
    return compare(expected[:common], logits[:common])


def answer_faults(parity: Parity | None) -> list[str]:
    """Return a fault if logits differ by more than a few flipped spikes explain, else (or for None) an empty list."""
    if parity is None:
        return []
    logits_agree = parity.within_tolerance >= SAME_ROWS * parity.rows
    labels_agree = parity.labels_differ <= max(1, (1 - SAME_LABELS) * parity.rows)
    if logits_agree and labels_agree:
        return []
    return [f"the artefact's answers differ from those of the exported network: {parity}"]
