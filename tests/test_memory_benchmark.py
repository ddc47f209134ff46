"""The bytes and operations that the benchmarks count instead of measuring them."""

import sys
from pathlib import Path

import pytest
import torch

from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import estimate
import harness
import largest
import memory
from live import Live


@pytest.mark.parametrize("recompute", memory.RECOMPUTE)
@pytest.mark.parametrize("training", memory.DEFENCES)
def test_the_bytes_quoted_are_the_bytes_kept(training: str, recompute: str) -> None:
    name = "vgg-small on 8x8 digits"
    quoted = harness.load("memory")["bytes"][name][training][recompute]["4"]
    assert memory.measure(*memory.NETWORKS[name], training, 4, recompute) == pytest.approx(quoted, rel=0.02)


@pytest.mark.parametrize("fields", [{}, {"norm": "none", "readout": "membrane"}, {"norm": "bn"}])
@pytest.mark.parametrize(("training", "recompute"), [("REG", "none"), ("empirical", "none"), ("empirical", "layers")])
def test_memory_grows_linearly_with_the_steps(training: str, recompute: str, fields: dict[str, str]) -> None:
    counted = {
        str(T): memory.measure("vgg-small", (1, 8, 8), training, T, recompute, batch=16, **fields) for T in (2, 4, 8)
    }
    for what in ("kept", "peak"):
        offset, slope, off = memory.fit(counted, what)
        assert slope > 0
        assert off < (0.01 if what == "kept" else 0.1)  # the peak of few steps lies elsewhere
        assert abs(offset) < 0.2 * counted["8"][what]


def test_live_storages_are_counted_once_and_forgotten_when_they_go() -> None:
    """A product of [2, 64] float32: made, seen through a view, and gone; what was there before does not count."""
    x = torch.rand(2, 64)
    with Live() as live:
        y = x * 2
        view = y.T[3:]
        x.add_(1)
        assert live.now == 2 * 64 * 4
        z = y + 1
        del y, z
        assert (live.now, live.peak) == (2 * 64 * 4, 2 * 2 * 64 * 4)
        del view
        assert (live.now, live.peak) == (0, 2 * 2 * 64 * 4)


def test_counting_without_data_is_counting_with_data() -> None:
    found = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = build_model(recipe("vgg-small", 0.25), (1, 8, 8), 10)
        with Live() as live:
            net(torch.zeros(3, 1, 8, 8, device=device)).sum().backward()
        found[device] = live.peak
    assert found["cpu"] == found["meta"]


def test_a_real_step_takes_what_was_counted_and_the_largest_fits() -> None:
    found = largest.measure(2, 2, 0.05)
    assert found["peak_bytes"] > found["counted_bytes"] + found["kept_for_good_bytes"] > 0
    quoted = harness.load("largest")
    assert (quoted["setting"]["T"], quoted["setting"]["batch"], quoted["setting"]["width"]) == (32, 128, 1)
    assert quoted["peak_bytes"] < 24 * 2**30


def test_the_estimate_counts_what_a_hand_can_count() -> None:
    """VGG11's 61.4 M parameters; its convolutions and layers, two operations a multiplication; backward once more and
    twice but for the images, of which nobody wants a gradient."""
    found = estimate.measure("vgg11", 32, 10, steps=2, batch=2)
    sizes = ((3, 64, 32), (64, 128, 16), (128, 256, 16), (256, 512, 8), *[(512, 512, 8)] * 2, *[(512, 512, 4)] * 2)
    convolutions = [9 * fan_in * fan_out * side**2 for fan_in, fan_out, side in sizes]
    forward = 2 * 2 * (sum(convolutions) + 8192 * 4096 + 4096 * 4096 + 4096 * 10)
    assert found["forward_flop"] == forward
    assert found["backward_flop"] == 2 * forward - 2 * 2 * convolutions[0]
    assert found["channels"] == 64 + 128 + 256 + 5 * 512
    assert found["parameters"] / 1e6 == pytest.approx(61.4, abs=0.05)
    quoted = harness.load("estimate")["networks"]["VGG11, 32x32, 10 classes"]
    assert quoted["forward_flop"] == 4 * forward
    assert estimate.exchanged(100, 2) == 400
    assert estimate.normalised(10, 2) == 80 + 80


def recipe(name: str, width: float) -> Recipe:
    return Recipe.model_validate({"model": {"name": name, "width": width}, "encoding": {"T": 2}})
