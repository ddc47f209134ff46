"""Measure which settings run a network fastest here, in `mpdsgr build` or when a server starts."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle, Prepared
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import hardware
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings, prepared
from mpdsgr_deploy.runtime.onnx_runtime import OnnxRuntime
from mpdsgr_deploy.runtime.openvino import OpenVino
from mpdsgr_deploy.runtime.session import usual_threads

BATCHES = (1, 8, 32)  # batch sizes that are timed
CHUNKS = (8, 4, 16, 32)  # the most promising first, in case time runs out
REPETITIONS = 3  # timed inferences per batch size
SECONDS = 20.0  # seconds after which no further candidate is started
START_SECONDS = 1.0  # seconds that a server may spend on measuring when it starts
PAYS = 1.5  # the speed-up that twice the threads must give; with less, they are worth more to other requests
CHUNK_PAYS = 1.05  # the speed-up per image that chunks must give

Opener = Callable[..., AbstractContextManager[Predictor]]
OPENERS: dict[str, Opener] = {"openvino": OpenVino, "onnxruntime-cpu": OnnxRuntime}


def tune(
    backend: str, bundle: Bundle, precision: str, batch: tuple[int, int, int] | None = None
) -> tuple[Bundle, Prepared]:
    """Return the bundle with the fastest settings of a backend for this machine, and their manifest entry.

    The chunk is chosen first, with one thread per core; then fewer threads are tried. The fastest settings have the
    smallest geometric mean of times over batches of 1, 8 and 32. Raises InputError if `batch` is given, because
    settings serve all batch sizes, and if the backend cannot run here.
    """
    if batch is not None:
        raise InputError(f"--batch has no effect for {backend}, whose settings serve all batch sizes; leave it out")
    noise = NoiseSource(bundle.manifest.noise, bundle.manifest.recipe.validation.seed)
    opener = partial(OPENERS[backend], bundle.variant(precision), noise=noise)
    images = np.random.default_rng(0).random((max(BATCHES), *bundle.manifest.input_shape), np.float32)
    deadline = time.monotonic() + SECONDS
    cores = int(hardware()["cores"])
    best = _fastest(opener, images, deadline, [RuntimeSettings(threads=cores, chunk=chunk) for chunk in CHUNKS])
    fewer = [RuntimeSettings(threads=threads, chunk=best.chunk) for threads in halvings(cores)]
    best = _fastest(opener, images, deadline, [best, *fewer])
    addition = prepared(bundle, backend, precision, best)
    return bundle.add(addition), addition


def halvings(cores: int) -> Iterator[int]:
    """Yield cores/2, cores/4, ... down to 1; nothing for one core."""
    while cores > 1:
        cores //= 2
        yield cores


def measured_at_start(backend: str, bundle: Bundle, precision: str, cores: int) -> RuntimeSettings:
    """Measure settings for a server with `cores` cores, for a bundle that has none for this machine.

    The number of threads is doubled, from one up to `cores`, as long as that speeds the network up by PAYS;
    OMP_NUM_THREADS, if set, is used instead. A network that is too slow to be measured, or even opened, in
    START_SECONDS gets a thread per core. Raises InputError if the backend cannot run here.
    """
    noise = NoiseSource(bundle.manifest.noise, bundle.manifest.recipe.validation.seed)
    images = np.random.default_rng(0).random((max(BATCHES), *bundle.manifest.input_shape), np.float32)
    deadline, best = time.monotonic() + START_SECONDS, RuntimeSettings()
    doublings = [*(2**n for n in range(cores.bit_length()) if 2**n < cores), cores]
    for threads in [usual_threads()] if usual_threads() else doublings:
        with OPENERS[backend](bundle.variant(precision), noise=noise, settings=RuntimeSettings(threads=threads)) as run:
            timings = _timings(run, images, deadline)
        if timings and best.milliseconds and _speedup(best.milliseconds, timings) < PAYS:
            break
        if len(timings) < 2 or time.monotonic() > deadline:
            whole = cores >= hardware()["cores"]
            return RuntimeSettings(threads=usual_threads() or (None if whole else cores))
        best = RuntimeSettings(threads=threads, chunk=_chunk(timings), milliseconds=timings)
    log.info("%s, %s: %s threads, %s ms", bundle.path.name, precision, best.threads, best.milliseconds)
    return best


def _speedup(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the geometric mean of the speed-up over the batch sizes, at least one, that both have."""
    return math.exp(statistics.fmean(math.log(before[n] / after[n]) for n in before.keys() & after.keys()))


def _timings(predictor: Predictor, images: NDArray[np.float32], deadline: float) -> dict[str, float]:
    """Return milliseconds by batch size, for the sizes that can probably be measured before the deadline."""
    timings: dict[str, float] = {}
    seconds_per_image = 0.0
    for batch in BATCHES:
        if time.monotonic() + (REPETITIONS + 1) * seconds_per_image * batch > deadline:
            break
        timings[str(batch)] = milliseconds(predictor, images[:batch])
        seconds_per_image = timings[str(batch)] / 1000 / batch
    return timings


def _chunk(timings: Mapping[str, float]) -> int | None:
    """Return how many images to compute at once, or None for all: 8 if an image of a batch of 32 takes longer.

    It takes longer if the activations of a large batch do not fit into a cache.
    """
    *_, middle, large = BATCHES
    if str(large) in timings and timings[str(large)] / large > CHUNK_PAYS * timings[str(middle)] / middle:
        return middle
    return None


def _fastest(
    opener: Opener,
    images: NDArray[np.float32],
    deadline: float,
    candidates: list[RuntimeSettings],
) -> RuntimeSettings:
    """Return the fastest candidate with its milliseconds; after the deadline, no more than the first is measured."""
    measured: list[RuntimeSettings] = []
    for candidate in candidates:
        if measured and time.monotonic() > deadline:
            log.info("%.0f s have passed, so the remaining settings are not measured", SECONDS)
            break
        if candidate.milliseconds:
            measured.append(candidate)
            continue
        with opener(settings=candidate) as predictor:
            timings = {str(batch): milliseconds(predictor, images[:batch]) for batch in BATCHES}
        log.info("%d threads, chunks of %d: %s ms", candidate.threads, candidate.chunk, timings)
        measured.append(candidate.model_copy(update={"milliseconds": timings}))
    return min(measured, key=lambda settings: math.prod(settings.milliseconds.values()))


def milliseconds(predictor: Predictor, images: NDArray[np.float32]) -> float:
    """Return the milliseconds of the shortest of a few inferences, which other work disturbed least."""
    predictor(images)  # the first call compiles and allocates
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        predictor(images)
        seconds.append(time.perf_counter() - started)
    return round(1000 * min(seconds), 3)
