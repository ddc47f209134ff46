"""Choose a few images that an attack broke, and draw them for the report as small PNG files."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdsgr_deploy.validation.report import Example

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]
SIDE = 96  # smaller images are enlarged until their longer side has at least this many pixels


def examples(
    clean: Floats,
    attacked: Floats,
    classes: Classes,
    *,
    before: Classes,
    after: Classes,
    labels: Sequence[str],
    attack: str,
    eps: float | None = None,
    count: int = 6,
) -> list[Example]:
    """Return at most `count` of the images that the attack broke, of as many classes as possible.

    clean, attacked: images [N, C, H, W] in [0, 1]. classes [N]: the true classes. before, after [N]: those predicted
    for clean and attacked images; a negative one in `after` means that no output was finite. In the picture of the
    difference -eps is black and eps is white; without eps, the image's largest change takes its place.
    """
    return [
        Example(
            image=int(i),
            label=labels[classes[i]],
            clean=labels[before[i]],
            attacked=labels[after[i]] if after[i] >= 0 else "nothing finite",
            attack=attack,
            pictures=(picture(clean[i]), picture(attacked[i]), picture(magnified(clean[i], attacked[i], eps))),
        )
        for i in chosen(classes, (before == classes) & (after != classes), count)
    ]


def chosen(classes: Classes, broken: NDArray[np.bool_], count: int) -> list[int]:
    """Return the places of up to `count` broken images: the first of every class, then the second, and so on."""
    last_rank: dict[int, int] = {}  # by class
    ranks: list[tuple[int, int]] = []  # place among the broken images of its class, place in the batch
    for i in np.flatnonzero(broken):
        rank = last_rank[int(classes[i])] = last_rank.get(int(classes[i]), -1) + 1
        ranks.append((rank, int(i)))
    return sorted(i for _, i in sorted(ranks)[:count])


def magnified(clean: Floats, attacked: Floats, eps: float | None) -> Floats:
    """Return the difference [C, H, W] of two images, mapped from [-eps, eps] to [0, 1]; 0.5 means no change."""
    difference = attacked - clean
    span = eps or float(np.abs(difference).max()) or 1.0
    return np.clip(0.5 + difference / (2 * span), 0, 1)


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
