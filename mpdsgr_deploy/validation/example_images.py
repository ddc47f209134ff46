"""Choose a few images that an attack broke, and draw them for the report as small PNG files."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdsgr_deploy.attacks.condition import STRONG, Classes, Floats
from mpdsgr_deploy.attacks.resumable_run import NOT_FINITE
from mpdsgr_deploy.attacks.suite_measurement import Measurement
from mpdsgr_deploy.validation.report import Example

COUNT = 6
SIDE = 96  # smaller images are enlarged until their longer side has at least this many pixels


def examples(x: Floats, labels: Sequence[str], measurement: Measurement) -> list[Example]:
    """Return at most COUNT of the images x [n, C, H, W] that the strong PGD broke, of as many classes as possible.

    labels: the names of the classes. In the picture of the difference -eps is black and eps is white. The result is
    empty if the strong PGD was not made.
    """
    strong = measurement.outcome(STRONG)
    if strong is None or strong.images is None:
        return []
    attacked, after, bound = strong.images, strong.predicted, strong.condition.bound
    y, before = measurement.y[: len(after)], measurement.clean[: len(after)]
    return [
        Example(
            image=i,
            label=labels[y[i]],
            clean=labels[before[i]],
            attacked=labels[after[i]] if after[i] != NOT_FINITE else "nothing finite",
            attack=STRONG,
            pictures=(picture(x[i]), picture(attacked[i]), picture(magnified(x[i], attacked[i], bound))),
        )
        for i in chosen(y, (before == y) & (after != y), COUNT)
    ]


def chosen(classes: Classes, broken: NDArray[np.bool_], count: int) -> list[int]:
    """Return the places of up to `count` broken images: the first of every class, then the second, and so on."""
    last_rank: dict[int, int] = {}  # by class
    ranks: list[tuple[int, int]] = []  # place among the broken images of its class, place in the batch
    for i in np.flatnonzero(broken):
        rank = last_rank[int(classes[i])] = last_rank.get(int(classes[i]), -1) + 1
        ranks.append((rank, int(i)))
    return sorted(i for _, i in sorted(ranks)[:count])


def magnified(clean: Floats, attacked: Floats, eps: float) -> Floats:
    """Return the difference [C, H, W] of two images, mapped from [-eps, eps] to [0, 1]; 0.5 means no change."""
    return np.clip(0.5 + (attacked - clean) / (2 * eps), 0, 1)


def picture(image: Floats) -> str:
    """Return an image [C, H, W] in [0, 1] as PNG in base64. Channels are averaged unless there are 1 or 3."""
    planes = image if len(image) in (1, 3) else image.mean(0, keepdims=True)
    pixels = np.round(255 * np.clip(planes, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    drawn = Image.fromarray(pixels if len(planes) == 3 else pixels[..., 0])
    scale = math.ceil(SIDE / max(drawn.size))
    drawn = drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
    out = io.BytesIO()
    drawn.save(out, format="png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
