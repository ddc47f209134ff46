"""Write the golden batch of a bundle: a few inputs, and the logits of each precision that every machine must give."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import GOLDEN

GOLDEN_ROWS = 8  # largest number of golden inputs


def save_golden(
    folder: Path,
    inputs: NDArray[np.float32],
    logits: Mapping[str, NDArray[np.float32]],
    agreeing: NDArray[np.bool_],
) -> None:
    """Write those of the inputs [N, C, H, W] that `golden_rows` chooses, and their logits [N, K] by precision."""
    rows = golden_rows(agreeing, [*logits.values()])
    arrays: dict[str, Any] = {name: answers[rows] for name, answers in logits.items()}
    np.savez(folder / GOLDEN, inputs=inputs[rows], **arrays)


def golden_rows(agreeing: NDArray[np.bool_], logits: Sequence[NDArray[np.float32]]) -> NDArray[np.intp]:
    """Return the rows, at most GOLDEN_ROWS of N, whose logits another machine should reproduce.

    agreeing [N]: whether torch and the ONNX file agree on a row, which shows that rounding flips no spike. logits: an
    array [N, K] for each precision. Of the agreeing rows, those with the largest margins between the two best logits
    are chosen, where the smallest margin of all precisions counts.
    """
    rows = np.flatnonzero(agreeing)
    best = np.stack([np.sort(answer, axis=1)[:, -2:] for answer in logits])  # [variants, rows, 2]
    margins = (best[..., -1] - best[..., 0]).min(0)  # 0 if there is only one label
    return np.sort(rows[np.argsort(-margins[rows], kind="stable")][:GOLDEN_ROWS])
