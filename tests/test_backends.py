"""Every backend answers as the torch model does, with settings measured on this machine where there are any."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr

from mpdsgr_deploy.bundle import Bundle, Manifest, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.runtime import NoiseSource, open_predictor, tuning
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings, machine, prepared, prepared_settings
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.runtime.tuning import measured_at_start, tune

BUNDLES = Path(__file__).parent.parent / "export" / "bundles"
TUNED = ("openvino", "onnxruntime-cpu")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))


@pytest.mark.parametrize("backend", TUNED)
@pytest.mark.parametrize("settings", [RuntimeSettings(), RuntimeSettings(threads=1, chunk=3)])
def test_parity_with_torch_in_batches_of_every_kind(
    copy: Bundle, images: np.ndarray, backend: str, settings: RuntimeSettings
) -> None:
    expected = TorchModel.from_bundle(copy)(images)
    tuned = copy.add(prepared(copy, backend, "fp32", settings))
    with open_predictor(tuned, backend) as predictor:
        for batch in (1, 2, 3, 7, 8, 9, 13, 40):
            parity = compare(expected[:batch], predictor(images[:batch]))
            assert parity.labels_differ == 0
            assert parity.max_abs <= 1e-5, parity
        assert compare(expected[::2], predictor(images[::2])).holds  # not contiguous in memory


@pytest.mark.parametrize("backend", TUNED)
def test_outputs_are_fresh_and_threads_may_share_a_predictor(bundle: Bundle, images: np.ndarray, backend: str) -> None:
    with open_predictor(bundle, backend) as predictor:
        first = predictor(images)
        kept = first.copy()
        predictor(images[::-1].copy())
        assert np.array_equal(first, kept)
        first[:] = 0
        batches = [images[i : i + 7] for i in range(20)]
        alone = [predictor(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(predictor, batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", TUNED)
def test_tuned_settings_are_used_on_this_machine_only(copy: Bundle, backend: str) -> None:
    tuned, record = tune(backend, copy, "fp32")
    assert record.machine == machine(backend)
    found = prepared_settings(open_bundle(tuned.path), backend, "fp32")
    assert found.threads is not None
    assert found.chunk in tuning.CHUNKS
    assert set(found.milliseconds) == {"1", "8", "32"}
    assert min(found.milliseconds.values()) > 0
    with open_predictor(tuned, backend) as predictor:
        assert predictor._chunk == found.chunk

    for other in ({"machine": {**record.machine, "cores": "1024"}}, {"model_sha256": "0" * 64}):
        moved = Bundle(copy.path, copy.manifest.model_copy(update={"prepared": (record.model_copy(update=other),)}))
        assert prepared_settings(moved, backend, "fp32") == RuntimeSettings()
    damaged = record.model_copy(update={"settings": {"threads": 0}})
    broken = Bundle(copy.path, copy.manifest.model_copy(update={"prepared": (damaged,)}))
    with pytest.raises(InputError, match=f"settings of {backend}, fp32.*threads"):
        prepared_settings(broken, backend, "fp32")


@contextmanager
def with_settings(model: Path, *, noise: NoiseSource, settings: RuntimeSettings) -> Iterator[RuntimeSettings]:
    yield settings


def test_tuning_keeps_the_fastest_and_stops_in_time(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in whose times are known: chunks of 16 are fastest, then one thread beats two."""

    def known(settings: RuntimeSettings, images: np.ndarray) -> float:
        return abs(settings.chunk - 16) + settings.threads + len(images)

    monkeypatch.setitem(tuning.OPENERS, "openvino", with_settings)
    monkeypatch.setattr(tuning, "milliseconds", known)
    monkeypatch.setattr(tuning, "hardware", lambda: {"cpu": "one", "cores": 4})
    _, record = tune("openvino", copy, "fp32")
    assert record.settings == {"threads": 1, "chunk": 16, "milliseconds": {"1": 2, "8": 9, "32": 33}}
    monkeypatch.setattr(tuning, "SECONDS", -1.0)
    _, record = tune("openvino", copy, "fp32")
    assert (record.settings["threads"], record.settings["chunk"]) == (4, tuning.CHUNKS[0])
    with pytest.raises(InputError, match="leave it out"):
        tune("openvino", copy, "fp32", (1, 8, 32))


@pytest.mark.parametrize(
    ("costs", "threads", "chunk"),
    [
        (lambda threads, n: n / min(threads, 4), 4, None),  # eight are no faster than four
        (lambda threads, n: n / threads**0.5, 1, None),  # two threads, 1.4 times as fast: 1.4 times the CPU
        (lambda threads, n: n / threads * (1.2 if n > 8 else 1), 6, 8),  # pays to the last core; large batches do not
        (lambda threads, n: 60 * n / threads, None, None),  # too slow to be measured: a thread per core
    ],
)
def test_a_start_takes_the_threads_that_pay(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, costs: Callable[[int, int], float], threads: int, chunk: int
) -> None:
    monkeypatch.setitem(tuning.OPENERS, "openvino", with_settings)
    monkeypatch.setattr(tuning, "milliseconds", lambda settings, images: costs(settings.threads, len(images)))
    monkeypatch.setattr(tuning, "hardware", lambda: {"cores": 6})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = measured_at_start("openvino", copy, "fp32", 6)
    assert (settings.threads, settings.chunk) == (threads, chunk)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert measured_at_start("openvino", copy, "fp32", 6).threads == 3


def test_a_start_with_slow_loading_takes_all_threads(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    elapsed: list[float] = []

    def opened(*arguments: object, **options: object) -> nullcontext[None]:
        elapsed.append(0.6 * tuning.START_SECONDS)  # the second network is open only after the deadline
        return nullcontext()

    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: sum(elapsed)))
    monkeypatch.setitem(tuning.OPENERS, "openvino", opened)
    monkeypatch.setattr(tuning, "milliseconds", lambda predictor, images: 1.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert measured_at_start("openvino", copy, "fp32", 1024).threads is None


def test_the_build_command(copy: Bundle) -> None:
    done = mpdsgr("build", copy.path, "--backend", "openvino", "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert prepared_settings(open_bundle(copy.path), "openvino", "fp32").model_dump() == settings
    assert_input_error(mpdsgr("build", copy.path, "--backend", "openvin"), "did you mean 'openvino'")
    assert_input_error(mpdsgr("build", copy.path, "--backend", "openvino", "--precision", "int4"), "it has fp32")


def test_a_manifest_keeps_its_digest_when_a_later_version_adds_a_field(bundle: Bundle) -> None:
    class Later(Manifest):
        more: tuple[str, ...] = ()

    later = Later.model_validate(bundle.manifest.model_dump())
    assert later.computed_digest() == bundle.manifest.digest
    assert later.model_copy(update={"more": ("x",)}).computed_digest() != bundle.manifest.digest
