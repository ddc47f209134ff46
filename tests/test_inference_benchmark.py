"""The benchmark of inference: its page, its turns, and that the limit is the network's own int8 products."""

import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import figures
import inference
import onnx
from networks import settled

from mpdsgr_deploy.recipe import Recipe


def test_the_page_quotes_the_file() -> None:
    result = figures.load("inference")
    assert figures.shown("inference") == inference.render(result)
    for taken in result["seconds"].values():
        assert {inference.REFERENCE, inference.INT8, inference.LIMIT} < taken.keys()
        assert len({len(samples) for samples in taken.values()}) == 1


def test_a_small_benchmark_runs_and_its_limit_has_the_networks_int8_weights(tmp_path: Path) -> None:
    model = settled(Recipe.model_validate({"model": {"name": "vgg11", "width": 0.02}, "encoding": {"T": 2}}))
    with ExitStack() as stack:
        variants = inference.ours(model, 2, 1, tmp_path, stack)
        taken = inference.take_turns(variants, 3, 0.0)
    assert {name: len(samples) for name, samples in taken.items()} == dict.fromkeys(variants, 2)
    assert min(map(min, taken.values())) > 0

    def weights(name: str) -> list[tuple[int, ...]]:
        constants = onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        signed = [t for t in constants if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
        return sorted(tuple(t.dims) for t in signed)

    assert len(weights("limit")) == 9  # 7 convolutions and 2 hidden layers
    assert weights("limit") == weights("int8")


def test_every_variant_has_its_turn_in_every_place() -> None:
    seen: list[str] = []
    variants = {name: lambda batch, name=name: seen.append(name) or 1.0 for name in "abc"}
    taken = inference.take_turns(variants, 1, -1.0)
    assert "".join(seen) == "abc" + "abc" + "bca"  # warmed up, then two turns
    assert taken == {name: [1.0, 1.0] for name in "abc"}


def test_ratios_are_paired() -> None:
    assert inference.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0], "{:.1f}") == "3.0 [2.0, 4.0]"
