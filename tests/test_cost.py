"""mpdsgr bench BUNDLE: what an image costs on this machine."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_input_error, mpdsgr_here

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.prediction import cost as cost_module
from mpdsgr_deploy.prediction.cost import Cost, estimate, gpu_energy, measure_costs, package_energy, used_energy


def test_every_combination_is_measured_or_says_why_not(precise: Bundle) -> None:
    costs = measure_costs(precise, ["onnxruntime-cpu", "tensorrt"], ["fp32", "int8"], [1, 9], seconds=0.01)
    assert len(costs) == 8
    for cost in costs:
        if cost.backend == "tensorrt":
            assert cost.error
            continue
        assert cost.images_per_second > 0
        assert 0 < cost.latency_ms <= cost.latency_p95_ms
        assert cost.memory_mib is None or cost.memory_mib > 10
        # a batch takes what its images take, but for the calls between them
        assert cost.batch / cost.images_per_second >= 0.5 * cost.latency_ms / 1000


def test_hours_and_machines() -> None:
    cost = Cost("b", "fp32", 1, images_per_second=100.0)
    assert estimate(cost, 720_000, 0.5) == (720_000, 2.0, 4)
    assert estimate(cost, 1, 24).machines == 1


def test_energy_is_read_where_the_machine_tells(tmp_path: Path) -> None:
    assert package_energy(tmp_path) is None
    for number, microjoules in enumerate((2_000_000, 500_000)):
        (tmp_path / f"intel-rapl:{number}").mkdir()
        (tmp_path / f"intel-rapl:{number}" / "energy_uj").write_text(f"{microjoules}\n")
    assert package_energy(tmp_path) == pytest.approx(2.5)


def test_a_gpus_energy_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = [1500, 500]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(millijoules),
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: millijoules[gpu],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(cost_module, "package_energy", lambda: 3.0)
    assert (gpu_energy(), used_energy()) == (2.0, 5.0)
    millijoules.clear()
    assert (gpu_energy(), used_energy()) == (None, 3.0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_energy() is None


def test_the_command(bundle: Bundle) -> None:
    base = ["bench", bundle.path, "--seconds", "0.1", "--batch", "1,4", "--backend", "onnxruntime-cpu"]
    done = mpdsgr_here(*base, "--backend", "tensorrt", "--total", 1000)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-cpu  fp32" in done.stdout
    assert "not measured: tensorrt fp32 batch 1" in done.stdout
    assert "1000 images take" in done.stdout
    found = json.loads(mpdsgr_here(*base, "--json").stdout)
    assert [cost["batch"] for cost in found["costs"]] == [1, 4]
    assert all(math.isfinite(cost["images_per_second"]) for cost in found["costs"])
    assert_input_error(mpdsgr_here("bench"), "give BUNDLE")
    assert_input_error(
        mpdsgr_here("bench", "--url", "http://127.0.0.1:1/v2/models/a", "--batch", "1,2"), "give one number of images"
    )
    assert mpdsgr_here("bench", bundle.path, "--seconds", "0.1", "--backend", "tensorrt").returncode == 3
