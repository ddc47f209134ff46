"""Measure each number of time steps: export a bundle's networks again at 1 to T steps, attack them and time them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, PGD, WORST
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.diagnostics.operation_counts import macs
from mpdsgr_deploy.exporting.step_search import Bools, Flips, StepFile, step_files, unfinished_attacks
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime
from mpdsgr_deploy.trained_networks import load_bundled

CONDITIONS = (CLEAN, PGD, WORST)
BATCHES = (1, 32)
ROUNDS = 15  # rounds of timing; each round times every number of steps, so that other load affects all equally


class StepCost(NamedTuple):
    """The accuracy and cost of one precision at its first `steps` time steps, on n images.

    correct, flips: by condition; flips are relative to all T steps of the same precision. milliseconds: the median time
    per image on onnxruntime's CPU provider, by batch size. macs: multiply-accumulates per image in products with
    weights.
    """

    precision: str
    steps: int
    n: int
    correct: Mapping[str, int]
    flips: Mapping[str, Flips]
    milliseconds: Mapping[int, float]
    macs: int


def step_costs(bundle: Bundle, images: Images) -> list[StepCost]:
    """Return the costs of each precision at 1 to T steps, measured on labelled `images`.

    After an interruption the same call continues with the remaining attacks; finished ones are kept in the user's cache
    until all rows are done. Raises InputError for a bundle without weights, and if the cache cannot be written.
    """
    with _every_step(bundle) as files, unfinished_attacks(bundle.manifest.digest, images) as place:
        attacked = {
            precision: [
                file.attacked(images, f"{precision}, {n} of {len(own)} steps", place / f"{precision}-{n}")
                for n, file in enumerate(own, 1)
            ]
            for precision, own in files.items()
        }
        return [cost for name, own in files.items() for cost in _costs(name, own, attacked[name], images)]


def step_times(bundle: Bundle, images: Images) -> dict[str, list[dict[int, float]]]:
    """Return `StepCost.milliseconds` of 1 to T steps, by precision. Raises InputError for a bundle without weights."""
    with _every_step(bundle) as files:
        return {precision: _times(own, images) for precision, own in files.items()}


@contextmanager
def _every_step(bundle: Bundle) -> Iterator[dict[str, list[StepFile]]]:
    """Export 1 to T steps of every precision to temporary files, and provide these by precision in a with block."""
    model, manifest = load_bundled(bundle, otherwise="it cannot be exported with fewer time steps"), bundle.manifest
    recipe, shape = manifest.recipe, manifest.input_shape
    layers = {name: variant.layers for name, variant in manifest.variants.items()}
    with TemporaryDirectory() as folder:
        numbers = range(1, recipe.encoding.T + 1)
        files = [step_files(model, recipe, shape, steps, layers, Path(folder)) for steps in numbers]
        yield {precision: [by_precision[precision] for by_precision in files] for precision in layers}


def _costs(
    precision: str, files: Sequence[StepFile], verdicts: Sequence[Mapping[str, Bools]], images: Images
) -> list[StepCost]:
    """Return the costs of one precision. files, verdicts: those of 1, 2, ..., T steps."""
    log.info("timing %s", precision)
    times = _times(files, images)
    return [
        StepCost(
            precision,
            steps,
            len(images),
            {name: int(own[name].sum()) for name in CONDITIONS},
            {name: Flips.of(verdicts[-1][name], own[name]) for name in CONDITIONS},
            milliseconds,
            macs(onnx.load(file.file), steps).exported,
        )
        for steps, (file, own, milliseconds) in enumerate(zip(files, verdicts, times, strict=True), 1)
    ]


def _times(files: Sequence[StepFile], images: Images) -> list[dict[int, float]]:
    """Return the median milliseconds per image of each file, by batch size."""
    columns = [_milliseconds(files, images.unit(), size) for size in BATCHES]
    return [dict(zip(BATCHES, row, strict=True)) for row in zip(*columns, strict=True)]


def _milliseconds(files: Sequence[StepFile], images: NDArray[np.float32], batch: int) -> list[float]:
    """Return the median milliseconds per image of each file, in batches of `batch` images."""
    x = np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])))
    with ExitStack() as stack:
        noise = [NoiseSource(file.noise, file.recipe.validation.seed) for file in files]
        networks = [stack.enter_context(OnnxRuntime(f.file, noise=n)) for f, n in zip(files, noise, strict=True)]
        seconds = [[timeit(partial(network, x), number=1) for network in networks] for _ in range(ROUNDS + 1)]
    return (1000 / batch * np.median(seconds[1:], axis=0)).tolist()  # the first round is warm-up
