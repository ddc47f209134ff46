"""The benchmarks' page shows what their results files hold; each of them runs."""

import itertools
import multiprocessing.dummy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exporting_once import to_graph
from scipy.stats import binom

from mpdsgr_deploy.exporting.precision import PRECISIONS
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation.gate import failures

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import agreement
import attack
import early_exit
import estimate
import gate_power
import gpu_rehearsal
import growth
import harness
import largest
import linear
import memory
import neurons
import ray_data
import step
import steps
import strength
import time_to_accuracy
import training
import workers


@pytest.mark.parametrize(
    "benchmark",
    [
        *(
            agreement,
            attack,
            early_exit,
            estimate,
            gate_power,
            gpu_rehearsal,
            growth,
            largest,
            linear,
            memory,
            neurons,
            ray_data,
            step,
        ),
        *(steps, strength, time_to_accuracy, training),
    ],
)
def test_the_page_quotes_the_files(benchmark: object) -> None:
    result = harness.load(benchmark.__name__)
    file, text = harness.page(benchmark.__name__, benchmark.render(result))
    assert file.read_text() == text
    assert result["provenance"]["hardware"]["cpu"]
    assert result["provenance"]["revision"]


def test_precisions_of_a_small_network_are_compared_with_float32(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "to_graph", to_graph)
    found = agreement.measure(run_dir, "data", images=60, attacked=20)
    rows = {(row["images"], row["precision"]): row for row in found["rows"]}
    assert list(rows) == [(images, p) for images in ("clean", "attacked") for p in PRECISIONS]
    for (images, precision), row in rows.items():
        exact = rows[images, "fp32"]
        assert row["n"] == {"clean": 60, "attacked": 20}[images]
        assert row["correct"] - exact["correct"] == row["newly_right"] - row["newly_wrong"]
        assert row["n"] - row["equal"] >= row["newly_right"] + row["newly_wrong"]
        assert precision != "fp32" or row["equal"] == row["n"]


def test_the_floor_counts_every_product_of_every_step() -> None:
    """VGG11 at an eighth of its width: the map is halved after the first, third and sixth convolution."""
    width = [3, 8, 16, 32, 64, 64, 64, 64, 64]
    sides = [32, 16, 16, 8, 8, 8, 4, 4]
    convolutions = sum(9 * a * b * side**2 for a, b, side in zip(width[:-1], width[1:], sides, strict=True))
    head = 64 * 4 * 4 * 512 + 512 * 512
    assert training.flops_an_image(0.125, 2) == 2 * 2 * (convolutions + head + 512 * 10)


def test_every_sample_of_every_variant_is_there() -> None:
    for seconds in harness.load("step")["seconds"].values():
        assert seconds.keys() == step.VARIANTS.keys()
        assert len({len(samples) for samples in seconds.values()}) == 1
        assert min(map(min, seconds.values())) > 0


class Clock:
    """Time that passes only while a contender works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_everyone_has_a_turn_in_every_place_and_warming_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(harness, "clock", clock)

    def work(name: str, seconds: float) -> float:
        def call() -> None:
            order.append(name)
            clock.now += seconds

        return harness.timed(call)

    contenders = {"a": lambda: work("a", 1.0), "b": lambda: work("b", 2.0), "c": lambda: work("c", 4.0)}
    assert harness.take_turns(contenders, 3, warm_up=2) == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(order) == "bca" + "cab" + "abc" + "bca" + "cab"


def test_ratios_are_of_the_same_turn_and_their_interval_is_that_of_the_median() -> None:
    assert harness.spread([2.0, 30.0, 4.0], [1.0, 10.0, 1.0], "{:.1f}") == "3.0 [2.0, 4.0]"
    assert harness.spread([3.0], [2.0]) == "1.50"
    ranks = [float(rank) for rank in range(1, 41)]
    assert harness.spread(ranks[::-1], form="{:g}") == "20.5 [14, 27]"
    with pytest.raises(ValueError, match="shorter"):
        harness.spread([1.0, 2.0], [1.0])


def test_an_interval_covers_the_median_as_often_as_the_binomial_distribution_says() -> None:
    """It misses where k - 1 samples or fewer lie on one side; one sample less a side would fall below 95 %."""
    for n in range(1, 60):
        below = binom(n, 0.5).cdf
        k, coverage = harness.interval(n)
        assert coverage == pytest.approx(1 - 2 * below(k))
        assert coverage >= 0.95 or (n < 6 and k == 0)
        assert 1 - 2 * below(k + 1) < 0.95


def test_a_table_has_a_line_for_each_row_and_its_notes() -> None:
    text = harness.table(["what", "ms"], [["a", 1], ["b", "2 [1, 3]"]], "one", "two")
    assert text == "| what | ms |\n|---|---|\n| a | 1 |\n| b | 2 [1, 3] |\n\none\ntwo\n"


def test_the_smallest_benchmark_measures_publishes_and_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    other, page = tmp_path / "other.md", tmp_path / "README.md"
    monkeypatch.setattr(harness, "PAGES", [other, page])
    other.write_text("no table\n")
    before, after = "before\n<!-- table: python benchmarks/step.py -->\n", "<!-- end of step -->\nafter\n"
    page.write_text(f"{before}old\n{after}")
    small = ["--width", "0.02", "--steps", "2", "--batch", "4", "--repetitions", "3"]
    attempt = CliRunner().invoke(step.main, [*small, "--mode", "try"], catch_exceptions=False)
    assert attempt.exit_code == 0
    assert page.read_text() == f"{before}old\n{after}"
    assert not (tmp_path / "step.json").exists()
    published = CliRunner().invoke(step.main, small, catch_exceptions=False)
    assert published.exit_code == 0
    result = harness.load("step")
    assert page.read_text() == before + published.output.removesuffix("\n") + after
    assert other.read_text() == "no table\n"
    assert {len(seconds) for variants in result["seconds"].values() for seconds in variants.values()} == {3}
    assert result["setting"]["batch"] == 4
    assert result["provenance"]["hardware"]["cpu"]
    assert "[75% interval] of n = 3 paired steps" in published.output
    page.write_text(f"{before}lost\n{after}")
    again = CliRunner().invoke(step.main, [*small, "--mode", "render"], catch_exceptions=False)
    assert again.output == published.output
    assert page.read_text() == before + published.output.removesuffix("\n") + after


def test_a_small_attack_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads in place of its processes, which take seconds to import torch.

    So their memory is not their own: a block is held with each attacker, more than the process had given back.
    """
    monkeypatch.setattr(attack.multiprocessing, "get_context", lambda method: multiprocessing.dummy)
    blocks, opened = [], attack.opened
    monkeypatch.setattr(attack, "opened", lambda *of: (blocks.append(np.ones(1 << 24)), opened(*of))[1])
    Path("/proc/self/clear_refs").write_text("5")  # what was held at most counts from here
    setting = {"width": 0.1, "T": 2, "batch": 2, "threads": 1, "steps": 1}
    found = attack.measure("vgg-small", setting, 2)
    assert found["median_difference"] < 1e-4
    assert {len(samples) for samples in found["seconds"].values()} == {2}
    assert found["peak_bytes"].keys() == found["seconds"].keys()
    assert min(found["peak_bytes"].values()) > 0


def test_gradients_and_queries_are_counted_apart_and_rows_add_up() -> None:
    counting = strength.Counting(torch.nn.Flatten())
    x = torch.rand(3, 1, 2, 2)
    with torch.no_grad():
        counting(x.clone().requires_grad_())
    counting(x)
    counting(x[:2].clone().requires_grad_())
    assert (counting.gradients, counting.queries) == (2, 6)
    for network in harness.load("strength")["networks"].values():
        rows = {found["attack"]: found for found in network["rows"]}
        union, clean = rows.pop(strength.UNION), rows.pop("clean")
        audit = rows.pop(strength.AUTOATTACK)
        assert union["correct"] <= min(found["correct"] for found in rows.values()) <= clean["correct"]
        assert union["gradients"] == pytest.approx(sum(found["gradients"] for found in rows.values()))
        assert max(union["correct"], audit["correct"]) <= clean["correct"] <= network["n"]


def test_our_worker_answers_time_and_memory() -> None:
    with workers.worker("ours", 0.05, 2, 1, "cpu") as ours:
        for task, precision in itertools.product(training.TASKS, training.PRECISIONS):
            sample = ours(task, 4, precision)
            assert sample["seconds"] > 0
            assert sample["bytes"] > sample["before"] > 1e7


def test_a_training_benchmark_is_tabled() -> None:
    samples = {
        task: {
            precision: {
                name: [{"seconds": 2.0 + i + turn / 10, "bytes": (1 + i) * 1e9} for turn in range(3)]
                for i, name in enumerate(training.NAMES)
            }
            for precision in training.PRECISIONS
        }
        for task in training.TASKS
    }
    floor = {"flops_an_image": 1e9, "flops_a_second": {"fp32": 2e11, "bf16": 4e11}, "copy_bytes_a_second": 1e10}
    setting = {"width": 1.0, "T": 8, "batch": 32, "threads": 2}
    result = {"samples": samples, "floor": floor, "setting": setting, "versions": {}}
    result["provenance"] = harness.load("step")["provenance"]
    row = next(line for line in training.render(result).splitlines() if "mpdsgr-deploy" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 32 images in 2.1 s; SpikingJelly takes 3.1; 3 passes of 1 GFLOP an image of 200 GFLOP/s
    assert cells == ["train", "fp32", "mpdsgr-deploy", "15.2", "1.48 [1.45, 1.50]", "1000", "0.50", "23%"]


def test_every_way_of_a_linear_layer_computes_the_same() -> None:
    x, weight = torch.rand(5, 7), torch.rand(3, 7)
    for way in linear.WAYS.values():
        torch.testing.assert_close(way(x, weight), x @ weight.t())
    samples = linear.measure(torch.float32, 2, shape=(4, 6, 5))
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys(linear.WAYS, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_steps_as_one_function_keep_the_potentials_alone(dtype: torch.dtype) -> None:
    current = torch.randn(4, 3, 2, 5, 5).to(dtype).requires_grad_()
    assert neurons.kept(neurons.as_one, current) == current.nbytes
    assert neurons.kept(neurons.Neurons(), current) > current.nbytes
    assert torch.equal(neurons.as_one(current), neurons.Neurons()(current))


def test_an_accuracy_is_reached_only_with_all_time_steps() -> None:
    accuracies = ((1, 0.9), (4, 0.5), (4, 0.8))
    curve = [{"T": T, "cpu_seconds": 10.0 * n, "accuracy": a} for n, (T, a) in enumerate(accuracies, 1)]
    assert [time_to_accuracy.reached(curve, target) for target in (0.5, 0.7, 0.85)] == [20.0, 30.0, None]


def test_growth_is_the_slope_of_the_logarithms() -> None:
    assert growth.exponent({"1": 3.0, "2": 6.0, "4": 12.0}) == pytest.approx(1)
    assert growth.exponent({"0.5": 1.0, "1": 4.0, "2": 16.0}) == pytest.approx(2)


def test_a_step_grows_no_worse_than_it_must() -> None:
    found = harness.load("growth")
    for name, (most_time, most_memory) in growth.BOUNDS.items():
        seconds = {value: sorted(taken)[len(taken) // 2] for value, taken in found["seconds"][name].items()}
        assert growth.exponent(seconds) < most_time + 0.1
        assert growth.exponent(found["kept"][name]) < most_memory + 0.01


def test_the_gate_refuses_a_healthy_network_less_than_once_in_a_hundred_times() -> None:
    for case in harness.load("gate_power")["cases"]:
        assert case["together"] >= case["alone"]
        assert case["drop"] or case["together"] < 0.01 * case["trials"]


def test_a_simulated_drop_is_refused_and_none_is_not() -> None:
    rng, pair = np.random.default_rng(0), gate_power.pairs()[0]
    none, half = (gate_power.draw(rng, pair, 300, drop, 0.0) for drop in (0.0, 0.5))
    assert not failures(Gate(max_drop=0.034), none)
    assert failures(Gate(max_drop=0.034), half)
    assert none[-1].artefact.correct <= min(row.artefact.correct for row in none)
