"""The benchmarks' page shows what their results files hold; what can be counted is counted again."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import figures
import memory
import step


@pytest.mark.parametrize("benchmark", [memory, step])
def test_the_page_quotes_the_files(benchmark: object) -> None:
    result = figures.load(benchmark.__name__)
    assert figures.shown(benchmark.__name__) == benchmark.render(result)
    assert result["provenance"]["hardware"]["cpu"]
    assert result["provenance"]["revision"]


def test_every_sample_of_every_variant_is_there() -> None:
    for seconds in figures.load("step")["seconds"].values():
        assert seconds.keys() == step.VARIANTS.keys()
        assert len({len(samples) for samples in seconds.values()}) == 1
        assert min(map(min, seconds.values())) > 0


def test_a_small_benchmark_runs() -> None:
    setting = {"width": 0.02, "T": 2, "batch": 4, "accelerator": "cpu"}
    seconds = step.measure(setting, "32-true", 3)
    assert {name: len(samples) for name, samples in seconds.items()} == dict.fromkeys(step.VARIANTS, 3)


@pytest.mark.parametrize("training", memory.ESTIMATORS)
def test_the_bytes_quoted_are_the_bytes_saved(training: str) -> None:
    name = "vgg-small on 8x8 digits"
    quoted = figures.load("memory")["bytes_per_image"][name][training]["4"]
    assert memory.measure(*memory.NETWORKS[name], training, 4) == pytest.approx(quoted, rel=0.02)


@pytest.mark.parametrize("fields", [{}, {"norm": "none", "readout": "membrane"}, {"norm": "bn"}])
@pytest.mark.parametrize("training", ["REG", "empirical"])
def test_memory_grows_linearly_with_the_steps(training: str, fields: dict[str, str]) -> None:
    saved = {T: memory.measure("vgg-small", (1, 8, 8), training, T, **fields) for T in memory.STEPS}
    slopes = [(saved[more] - saved[fewer]) / (more - fewer) for fewer, more in pairwise(memory.STEPS)]
    assert max(slopes) / min(slopes) < 1.03


def test_a_storage_is_counted_once_and_weights_are_not() -> None:
    """A linear layer saves its input, the product its factors: two storages of [2, 64] float32."""
    net = torch.nn.Linear(64, 64)
    x = torch.rand(2, 64)
    with memory.counted(net) as storages:
        y = net(x)
        (y * y[:, :1] + x.sum()).sum()
    assert sum(storages.values()) == 2 * (2 * 64 * 4)
