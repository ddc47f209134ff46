"""Make examples for the report: a few images that an attack broke, as small PNG files."""

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
SIDE = 96  # pixels: smaller images are enlarged to at least this side


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
    """Return at most `count` images that the attack broke, of as many classes as possible, chosen deterministically.

    clean, attacked: [N, C, H, W] in [0, 1]; classes [N]: the true ones; before, after [N]: those predicted for clean
    and attacked images. In the picture of the difference -eps is black and eps is white; without eps, the largest
    change takes its place.
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
    """Choose up to `count` broken images: the first of every class, then the second of every class, and so on."""
    seen: dict[int, int] = {}
    turns: list[tuple[int, int]] = []
    for i in np.flatnonzero(broken):
        turn = seen[int(classes[i])] = seen.get(int(classes[i]), -1) + 1
        turns.append((turn, int(i)))
    return sorted(i for _, i in sorted(turns)[:count])


def magnified(clean: Floats, attacked: Floats, eps: float | None) -> Floats:
    """Map the difference [C, H, W] from [-eps, eps] to [0, 1]: 0.5 means no change."""
    difference = attacked - clean
    span = eps or float(np.abs(difference).max()) or 1.0
    return np.clip(0.5 + difference / (2 * span), 0, 1)


def picture(image: Floats) -> str:
    """Encode an image [C, H, W] in [0, 1] as PNG in base64; channels are averaged unless there are 1 or 3."""
    planes = image if len(image) in (1, 3) else image.mean(0, keepdims=True)
    pixels = np.round(255 * np.clip(planes, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    drawn = Image.fromarray(pixels if len(planes) == 3 else pixels[..., 0])
    scale = math.ceil(SIDE / max(drawn.size))
    drawn = drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
    out = io.BytesIO()
    drawn.save(out, format="png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
