"""The benchmark of inference: its page, a small run, and that the limit is the network's own int8 products."""

import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import harness
import inference
import nodes
import onnx
import pytest
from exporting_once import to_graph
from networks import settled

from mpdsgr_deploy.recipe import Recipe


@pytest.fixture(autouse=True)
def _both_benchmarks_export_the_same_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for benchmark in (inference, nodes):
        monkeypatch.setattr(benchmark, "to_graph", to_graph)


def test_the_page_quotes_the_file() -> None:
    result = harness.load("inference")
    file, text = harness.page("inference", inference.render(result))
    assert file.read_text() == text
    for taken in result["seconds"].values():
        assert {*result["peers"], inference.INT8, inference.LIMIT} < taken.keys()
        assert len({len(samples) for samples in taken.values()}) == 1


def test_the_page_says_where_the_time_goes() -> None:
    result = harness.load("nodes")
    file, text = harness.page("nodes", nodes.render(result))
    assert file.read_text() == text
    for batches in result["measured"].values():
        for variants in batches.values():
            assert all(kinds["kinds"]["int8 products"] > 0 for name, kinds in variants.items() if name != nodes.OTHERS)


def test_nodes_are_counted_by_kind(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": 0.02}, "encoding": {"T": 2}})
    nodes.write_networks(recipe, tmp_path)
    measured = nodes.measure(tmp_path, 2, 1, 1, 3, 1, True)
    assert list(measured) == [nodes.EXPORTED, nodes.REWRITTEN, nodes.LIMIT, nodes.OTHERS]
    assert all(len(own["seconds"]) == 3 and sum(own["kinds"].values()) > 0 for own in measured.values())
    assert measured[nodes.EXPORTED]["kinds"]["conversions"] > 0 == measured[nodes.REWRITTEN]["kinds"]["conversions"]


def test_a_small_benchmark_runs_and_its_limit_has_the_networks_int8_weights(tmp_path: Path) -> None:
    model = settled(Recipe.model_validate({"model": {"name": "vgg11", "width": 0.02}, "encoding": {"T": 2}}))
    with ExitStack() as stack:
        variants = inference.ours(model, 2, 1, tmp_path, stack)
        samples = inference.measure(variants, 3, 0.0)
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys(variants, 2)
    assert min(map(min, samples.values())) > 0

    def weights(name: str) -> list[tuple[int, ...]]:
        constants = onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        signed = [t for t in constants if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
        return sorted(tuple(t.dims) for t in signed)

    assert len(weights("limit")) == 9  # 7 convolutions and 2 hidden layers
    assert weights("limit") == weights("int8")
