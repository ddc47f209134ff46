"""Decide whether two sets of logits agree: one definition for export, the golden check and validation."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mpdsgr_deploy.reference import Reference

TOLERANCE = 1e-5  # difference of logits that float32 rounding alone can cause
MINIMUM_SHARE = 0.95
GOLDEN_ROWS = 8
SAME_ROWS = 0.9  # share of images whose logits must agree to TOLERANCE where single spikes may be flipped by rounding
SAME_LABELS = 0.99


class Parity(BaseModel):
    """Comparison of logits row by row.

    A spiking network is discontinuous: where a membrane potential lies within rounding of the threshold, one spike
    differs and that image's logits move visibly. So two faithful float32 implementations agree within TOLERANCE on
    nearly all images, not on all; `max_abs` alone would measure luck.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON itself has no infinity

    rows: int
    max_abs: float
    within_tolerance: int
    labels_differ: int

    @property
    def holds(self) -> bool:
        """All labels equal and at least 95 % of the rows within TOLERANCE."""
        return self.rows > 0 and not self.labels_differ and self.within_tolerance >= MINIMUM_SHARE * self.rows

    def __str__(self) -> str:
        return (
            f"{self.rows - self.labels_differ} of {self.rows} labels equal, {self.within_tolerance} rows within "
            f"{TOLERANCE:g}, largest difference {self.max_abs:.2g}"
        )


def compare(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Parity:
    """Compare logits [N, K] with reference [N, K]; a non-finite difference counts as infinite."""
    difference = np.abs(reference.astype(np.float64) - logits).max(axis=1, initial=0)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    return Parity(
        rows=len(reference),
        max_abs=float(difference.max(initial=0)),
        within_tolerance=int((difference <= TOLERANCE).sum()),
        labels_differ=int((reference.argmax(1) != logits.argmax(1)).sum()),
    )


def golden_rows(agreeing: NDArray[np.bool_], logits: Sequence[NDArray[np.float32]]) -> NDArray[np.intp]:
    """Choose the rows whose logits another machine should reproduce, at most GOLDEN_ROWS of all N.

    agreeing [N]: where the reference and the file agree, so that no potential lies within rounding of the threshold.
    logits [N, K] of each precision: agreeing rows with the widest margins between the two best logits are chosen.
    """
    rows = np.flatnonzero(agreeing)
    best = np.stack([np.sort(answer, axis=1)[:, -2:] for answer in logits])  # [variants, rows, 2]
    margins = (best[..., -1] - best[..., 0]).min(0)  # 0 if there is only one label
    return np.sort(rows[np.argsort(-margins[rows], kind="stable")][:GOLDEN_ROWS])


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
