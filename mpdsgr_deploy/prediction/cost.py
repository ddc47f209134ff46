"""Measure time, memory and energy per image of a bundle's networks, by backend, precision and batch size."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import MpdsgrError, one_line
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.runtime.open import open_predictor

RAPL = Path("/sys/class/powercap")  # energy counters of the processor packages, in microjoules
ROUNDS = 5  # the smallest number of batches that are timed, after one that is not


class Cost(NamedTuple):
    """The measurement of one backend, precision and batch size.

    latency_ms, latency_p95_ms: the median and the 95th percentile of the time of a batch; memory_mib: the resident
    memory of the process afterwards; joules: the energy of the processor packages and GPUs per image; None if the
    machine reports none. error: why nothing was measured, else empty.
    """

    backend: str
    precision: str
    batch: int
    images_per_second: float = math.nan
    latency_ms: float = math.nan
    latency_p95_ms: float = math.nan
    memory_mib: float | None = None
    joules: float | None = None
    error: str = ""


class Estimate(NamedTuple):
    """The hours that `images` take on one machine, and the number of machines that finish in a given time."""

    images: int
    hours: float
    machines: int


def measure_costs(
    bundle: Bundle, backends: Sequence[str], precisions: Sequence[str], batches: Sequence[int], *, seconds: float
) -> list[Cost]:
    """Measure every combination of backend, precision and batch size for `seconds` each, on the bundle's golden inputs.

    A combination that cannot run has the reason in its `error`.
    """
    combinations = [(b, p, n) for b in backends for p in precisions for n in batches]
    return [_measured(bundle, *combination, seconds) for combination in track(combinations, "measuring")]


def estimate(cost: Cost, images: int, hours: float) -> Estimate:
    """Estimate the time of `images` at a measured rate, and the number of machines that finish within `hours`."""
    alone = images / cost.images_per_second / 3600
    return Estimate(images, alone, math.ceil(alone / hours))


def _measured(bundle: Bundle, backend: str, precision: str, batch: int, seconds: float) -> Cost:
    try:
        golden, _ = bundle.golden()
        x = np.ascontiguousarray(np.resize(golden, (batch, *golden.shape[1:])))
        with open_predictor(bundle, backend, precision) as predictor:
            predictor(x)
            times: list[float] = []
            energy, started = used_energy(), time.perf_counter()
            while len(times) < ROUNDS or time.perf_counter() - started < seconds:
                before = time.perf_counter()
                predictor(x)
                times.append(time.perf_counter() - before)
            spent, used = time.perf_counter() - started, used_energy()
            memory = resident_memory()
    except MpdsgrError as error:
        return Cost(backend, precision, batch, error=one_line(error))
    images = batch * len(times)
    joules = None if energy is None or used is None or used < energy else (used - energy) / images
    median, p95 = np.percentile(times, (50, 95)) * 1000
    return Cost(backend, precision, batch, images / spent, float(median), float(p95), memory, joules)


def resident_memory() -> float | None:
    """Return the resident memory of this process in MiB; None if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), None)


def used_energy() -> float | None:
    """Return the joules used by processors and GPUs since an arbitrary time; None if neither can be read."""
    readings = [joules for joules in (package_energy(), gpu_energy()) if joules is not None]
    return sum(readings) if readings else None


def gpu_energy() -> float | None:
    """Return the joules used by all NVIDIA GPUs since an arbitrary time; None if there is none or it cannot be read."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return sum(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus) / 1000 if gpus else None
    except Exception:  # an ImportError, or an NVMLError without a driver or for a GPU without an energy counter
        return None


def package_energy(root: Path = RAPL) -> float | None:
    """Return the joules used by all processor packages since an arbitrary time; None if they cannot be read."""
    try:
        counters = [int((zone / "energy_uj").read_text()) for zone in sorted(root.glob("intel-rapl:[0-9]"))]
    except OSError:
        return None
    return sum(counters) / 1e6 if counters else None
