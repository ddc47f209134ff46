"""The input of predictors: the check that every backend makes, and prediction of many images in batches."""

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.protocols import Predictor

ONE = np.float32(1).view(np.uint32)  # the bits of 1.0


def check_images(x: NDArray[np.float32], shape: tuple[int, int, int]) -> None:
    """Raise InputError unless x is float32 [B >= 1, *shape], finite, in [0, 1]."""
    if x.dtype != np.float32:
        raise InputError(f"images must be float32 in [0, 1], and these are {x.dtype}; divide uint8 pixels by 255")
    if x.ndim != 4 or x.shape[1:] != shape or not len(x):
        expected = ", ".join(map(str, shape))
        raise InputError(f"images must have shape [batch >= 1, {expected}], and these have {list(x.shape)}")
    if x.view(np.uint32).max() <= ONE:  # one pass finds both ends: the bits of negative numbers and NaN are larger
        return
    low, high = x.min(), x.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise InputError(f"pixels must be finite and in [0, 1], and these range from {low} to {high}; scale them first")


def predict(
    predictor: Predictor, x: NDArray[np.float32], batch_size: int = 128, what: str = "predicting"
) -> NDArray[np.float32]:
    """Return the logits float32 [N, K] of images float32 [N >= 1, C, H, W] in [0, 1], computed in batches.

    what: the name of the progress bar. Raises the predictor's errors.
    """
    starts = range(0, len(x), batch_size)
    return np.concatenate([predictor(x[start : start + batch_size]) for start in track(starts, what)])
