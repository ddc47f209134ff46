"""Checks of what is evaluated: is the artefact a function, the network that was exported, on the promised images?"""

import subprocess
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.validation.health.registry import Compared, Seen, health_check

Floats = NDArray[np.float32]
PROBE = 32  # images the artefact is asked about repeatedly
FEW_VALUES = 128  # distinct logits of a readout that counts spikes, at most; a linear readout has about one an image


@health_check(
    8,
    "the artefact is a function of its input",
    why="answers that depend on the batch, on earlier images or on chance are not those that were attacked",
    advice="state leaks between batches or the backend is not deterministic; export again, or use another backend",
)
def check_function(artefact: Predictor, x: Floats, fresh: Predictor | None = None) -> Seen:
    """The artefact answers the same again, in other batches, in another order, and in a fresh process."""
    probe, other = x[:PROBE], x[-PROBE:]
    first = artefact(probe)
    artefact(other)
    half = (len(probe) + 1) // 2
    faults = []
    for how, answer in (("asked again", artefact), *((("in a fresh process", fresh),) if fresh else ())):
        try:
            parity = compare(first, answer(probe))
        except subprocess.CalledProcessError as error:
            faults.append(f"{how}: it failed: {error.stderr.decode(errors='replace').strip()[-200:]}")
            continue
        if parity.within_tolerance < parity.rows:  # the same kernels on the same batch: every row must agree
            faults.append(f"{how}: {parity}")
    pieces = [artefact(piece) for piece in (probe[:half], probe[half:]) if len(piece)]
    splits = (("in two batches", np.concatenate(pieces)), ("in reverse order", artefact(probe[::-1])[::-1]))
    for how, logits in splits:
        parity = compare(first, logits)
        if not parity.holds:
            faults.append(f"{how}: {parity}")
    asked = "again, in two batches, in reverse order" + (" and in a fresh process" if fresh else "")
    return Seen(faults, f"{len(probe)} images {asked}: same answers")


@health_check(
    9,
    "something was compared",
    why="a comparison of nothing finds no difference",
    advice="give test images, and export with the data set at hand or write floors into the gate",
)
def check_compared(n: int, compared: Compared) -> Seen:
    """At least one image was compared, and with something."""
    against = "the reference" if compared.reference else "floors" if compared.floors else ""
    saw = f"{n} images against {against or 'nothing: no reference answered them, and the gate has no floor'}"
    return Seen([] if n and against else [saw], saw)


@health_check(
    10,
    "the attack graph is the network's own",
    why="a gradient of something else, or none, makes any network look robust",
    advice="export again; if the bundle came from elsewhere, do not trust it",
)
def check_attack_graph(attack_graph_faults: Sequence[str]) -> Seen:
    """The attack graph is the derivative of the very network under test."""
    return Seen(attack_graph_faults, "derived again from the network, byte for byte the same")


@health_check(
    11,
    "the images are the promised ones",
    why="on chosen images any network is accurate and robust",
    advice="validate on the data set itself (--root), or export again with it at hand",
)
def check_images(image_faults: Sequence[str], rule: str) -> Seen:
    """The images are those the reference saw, in their order, and those of the data set."""
    return Seen(image_faults, rule)


@health_check(
    12,
    "the outputs are logits",
    why="a softmax saturates and counts have plateaus: gradients and queries then find nothing to follow",
    advice="export the linear readout's mean over time, before any softmax or count",
)
def check_logits(logits: Floats) -> Seen:
    """The outputs [n, K] are logits: no probabilities, no counts of spikes."""
    sums = logits.sum(axis=1)
    faults = []
    if len(logits) and (logits >= 0).all() and np.abs(sums - 1).max() < 1e-3:
        faults.append("every row is positive and adds up to 1: probabilities")
    distinct = len(np.unique(logits.round(5)))
    if logits.size > 4 * FEW_VALUES and distinct <= FEW_VALUES:
        faults.append(f"{logits.size} outputs take {distinct} values only: counts of spikes")
    return Seen(faults, f"{distinct} distinct values in {len(logits)} rows")
