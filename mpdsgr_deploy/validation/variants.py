"""Compare the verdicts of each precision of a bundle with those of the float32 network on the same images."""

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import STRONG
from mpdsgr_deploy.attacks.measure import Measurement
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.runtime import open_predictor, predict
from mpdsgr_deploy.validation.report import VariantFlips
from mpdsgr_deploy.validation.rows import VerdictFlips


def variant_flips(
    bundle: Bundle, x: NDArray[np.float32], measurement: Measurement, batch_size: int
) -> list[VariantFlips]:
    """Compare every other precision of the bundle with float32, on clean images x [n, C, H, W] and on those that the
    strong PGD made from them on the measured network.
    """
    strong = measurement.outcome(STRONG)
    if len(bundle.manifest.variants) == 1 or strong is None or strong.images is None:
        return []
    verdicts: dict[str, list[NDArray[np.bool_]]] = {}
    for precision in bundle.manifest.variants:
        with open_predictor(bundle, precision=precision) as network:
            answers = (predict(network, images, batch_size, precision) for images in (x, strong.images))
            verdicts[precision] = [logits.argmax(1) == measurement.y for logits in answers]
    exact = verdicts.pop("fp32")
    return [
        VariantFlips(
            precision=precision,
            n=measurement.n,
            clean=VerdictFlips.of(exact[0], own[0]),
            attacked=VerdictFlips.of(exact[1], own[1]),
        )
        for precision, own in verdicts.items()
    ]
