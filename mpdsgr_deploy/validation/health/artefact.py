"""Check what is evaluated: that the artefact is a function and the exported network, on the promised images."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.parity import answer_faults, compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.validation.health.check_registry import Rebuilt, Seen, health_check

Floats = NDArray[np.float32]
PROBE = 32  # number of images that are given to the artefact repeatedly
ALONE = 8  # number of images that are given to it one by one
EACH = 5  # expected number of images per class from which on every class must occur
SUM_TOLERANCE = 1e-3  # largest distance from 1 of a sum of probabilities
FEW_VALUES = 128  # most distinct values of outputs that count as spike counts; logits have about one value per image
FEW_ROUNDED = 32  # the same for logits that the file rounds to 8 bits: spike counts of up to 31 steps


@health_check(
    8,
    "the artefact's answers depend only on its input",
    why=(
        "if answers depend on the batch, on earlier images or on chance, users get other answers than those that "
        "were attacked"
    ),
    advice="state is kept between batches, or the backend is not deterministic; export again, or use another backend",
)
def check_function(
    artefact: Predictor,
    x: Floats,
    fresh: Predictor | None = None,
    batch_sizes: Sequence[int] = (PROBE,),
    logits: Floats | None = None,
) -> Seen:
    """Check that the artefact gives the same logits again, in other batches and orders, and in a new process.

    x: images [n, C, H, W]. fresh: the artefact in a new process. batch_sizes: the recipe's, and the largest of every
    engine; each is tried, and one image more. logits [n, K]: those that the artefact gave for x before the attacks.
    """
    probe = x[:PROBE]
    first, last = artefact(probe), artefact(x[-PROBE:])
    half = (len(probe) + 1) // 2
    faults = []
    for before, answers in () if logits is None else ((logits[:PROBE], first), (logits[-PROBE:], last)):
        if answer_faults(parity := compare(before, answers)):
            faults.append(f"since the attacks began: {parity}")
    for how, answer in (("asked again", artefact), *((("in a fresh process", fresh),) if fresh else ())):
        try:
            parity = compare(first, answer(probe))
        except subprocess.CalledProcessError as error:
            faults.append(f"{how} it failed: {error.stderr.decode(errors='replace').strip()[-200:]}")
            continue
        # every row must agree, because the same kernels compute the same batch
        if parity.within_tolerance < parity.rows:
            faults.append(f"{how}: {parity}")
    for how, logits in _otherwise(artefact, probe, half):
        parity = compare(first, logits)
        if not parity.holds:
            faults.append(f"{how}: {parity}")
    for how, rows, logits in _other_sizes(artefact, x, batch_sizes):
        parity = compare(first[:rows], logits[:rows])
        if answer_faults(parity):
            faults.append(f"{how}: {parity}")
    asked = "again, in batches of other sizes and in reverse order" + (" and in a fresh process" if fresh else "")
    return Seen(faults, f"{len(probe)} images gave the same answers {asked}")


def _otherwise(artefact: Predictor, probe: Floats, half: int) -> Iterator[tuple[str, Floats]]:
    """Yield logits [m, K] of the same images, computed in other batches and in another order."""
    yield "in two batches", np.concatenate([artefact(piece) for piece in (probe[:half], probe[half:]) if len(piece)])
    yield "in reverse order", artefact(probe[::-1])[::-1]


def _other_sizes(artefact: Predictor, x: Floats, largest: Sequence[int]) -> Iterator[tuple[str, int, Floats]]:
    """Yield the number of rows to compare and logits [m, K], for batch sizes whose kernels may round differently."""
    alone = x[:ALONE]
    yield "one by one", len(alone), np.concatenate([artefact(alone[i : i + 1]) for i in range(len(alone))])
    for size in sorted({3, 7, *(min(size + more, len(x)) for size in largest for more in (0, 1))}):
        batch = x[:size]
        yield f"in a batch of {len(batch)}", min(len(batch), PROBE), artefact(batch)


@health_check(
    9,
    "the artefact was compared with something",
    why="a comparison over no images or without a reference finds no difference",
    advice="provide test images, and export on a machine with the data set or add floors to the gate",
)
def check_compared(n: int, against: str) -> Seen:
    """Check that at least one image was evaluated, and that there is a reference or a floor to compare with."""
    saw = f"{n} images against {against or 'nothing: no reference answered them, and the gate has no floor'}"
    return Seen([] if n and against else [saw], saw)


@health_check(
    11,
    "the images are the promised ones",
    why="any network is accurate and robust on images that were selected for it",
    advice="validate on the data set itself (--root), or export again with it at hand",
)
def check_images(image_faults: Sequence[str], rule: str) -> Seen:
    """Check that the images are those of the reference, in their order, and those of the data set."""
    return Seen(image_faults, rule)


def are_probabilities(outputs: Floats) -> bool:
    """Whether no output [n, K] is negative and every row adds up to 1; False without rows."""
    return bool(len(outputs) and (outputs >= 0).all() and np.abs(outputs.sum(axis=1) - 1).max() < SUM_TOLERANCE)


@health_check(
    12,
    "the outputs are logits",
    why=(
        "softmax saturates, and spike counts change only in steps; attacks then find no gradient and no change to "
        "follow"
    ),
    advice="export the mean over time of the linear readout, before any softmax or spike count",
)
def check_logits(logits: Floats, rounded_outputs: bool = False) -> Seen:
    """Check that the outputs [n, K] are logits, not probabilities or counts of spikes.

    rounded_outputs: whether the file rounds them to 8 bits, as quantisers do; such logits are accepted.
    """
    faults = []
    if len(logits) and (logits == logits[0]).all():
        return Seen(["every image has the same outputs, so no spike depends on the image"], "")
    if are_probabilities(logits):
        faults.append("every row is positive and adds up to 1, so the outputs are probabilities")
    distinct = len(np.unique(logits.round(5)))
    if logits.size > 4 * FEW_VALUES and distinct <= (FEW_ROUNDED if rounded_outputs else FEW_VALUES):
        faults.append(f"{logits.size} outputs take only {distinct} different values, as spike counts do")
    return Seen(faults, f"{distinct} different values in {len(logits)} rows")


@health_check(
    14,
    "every output is finite",
    why="the class with the largest output is arbitrary if an output is NaN",
    advice=(
        "a layer overflows; export that precision again with --max-drop, which keeps sensitive layers in a finer "
        "precision, or leave it out"
    ),
)
def check_finite(not_finite: Mapping[str, Sequence[int]]) -> Seen:
    """Check that no output of any image, clean or attacked, is NaN or infinite."""
    faults = [f"{name}: not finite for image {first_few(images)}" for name, images in not_finite.items() if images]
    return Seen(faults, f"outputs under {len(not_finite)} conditions are finite")


@health_check(
    15,
    "all classes are represented",
    why=(
        "the first images of a list sorted by class are all of one class, and accuracy on one class says nothing "
        "about the others"
    ),
    advice="use more images (--limit) or a data set in mixed order, and export again to extend the reference",
)
def check_classes(classes: NDArray[np.int64], labels: Sequence[str]) -> Seen:
    """Check that every class occurs, or for fewer than EACH images per class, half as many as chance gives at least.

    classes [n]: the true classes of the images; labels: the names of all K classes.
    """
    n, count = len(classes), len(labels)
    counts = np.bincount(classes[(classes >= 0) & (classes < count)], minlength=count)
    present = int((counts > 0).sum())
    expected = count * (1 - (1 - 1 / count) ** n) if count else 0.0  # expected number of classes among n random images
    saw = f"{present} of {count} classes among {n} images, {counts.min()} to {counts.max()} images each"
    missing = [label for label, images in zip(labels, counts, strict=True) if not images]
    few = present < expected / 2 or (n >= EACH * count and missing)
    return Seen([f"{saw}, and none of {first_few(missing)}"] if few else [], saw)


@health_check(
    16,
    "the network consists of standard operators",
    why="a custom operator or an unusual number type need not do what its name says",
    advice="export again; if the bundle comes from someone else, do not trust it",
)
def check_parts(foreign: Sequence[str]) -> Seen:
    """Check that the file uses standard operators, number types of its precision, and no external data."""
    return Seen(foreign, "only standard operators, only number types of the precision, and no data outside the file")


@health_check(
    17,
    "the files equal an export of the weights",
    why="if the files differ, someone has changed them: other weights, an added branch or a custom operator",
    advice="do not use these files; export again from the checkpoint",
)
def check_rebuilt(rebuilt: Rebuilt) -> Seen:
    """Check that exporting again from the bundle's weights and recipe gives the same files, byte for byte."""
    return Seen(
        rebuilt.faults,
        rebuilt.unknown or "the weights were exported again, and the files are equal byte for byte",
        not_compared=bool(rebuilt.unknown),
    )


def first_few(values: Sequence[object]) -> str:
    """Return the first five values as text, and how many more there are."""
    few = ", ".join(map(str, values[:5]))
    return f"{few} and {len(values) - 5} more" if len(values) > 5 else few
