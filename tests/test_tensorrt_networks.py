"""Which networks TensorRT-RTX builds an engine of, and what it says of others."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rtx import RTX, check_header
from test_export import NAMES, exported

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert
from mpdsgr_deploy.exporting.precision import plan as precisions_of_layers
from mpdsgr_deploy.runtime.tensorrt import build_engine
from mpdsgr_deploy.runtime.tensorrt.library import failure, one_line_message

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
E4M3 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)


def network(
    path: Path, nodes: list[Any], constants: dict[str, Any], *, inputs: dict[str, list[Any]], opset: int = 21
) -> Path:
    """An ONNX file of float32 `inputs` and the float32 output y; not checked, so that it may be a wrong one."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def quantised_spikes(dtype: Any, per_channel: bool) -> tuple[list[Any], dict[str, Any]]:
    """Spikes and weights through Q/DQ of scale 1 and max |w| / largest; the bias stays float32."""
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    largest = 127 if dtype == np.int8 else 448
    scale = np.abs(weight).max((1, 2, 3) if per_channel else None).astype(np.float32) / np.float32(largest)
    scaled = weight / scale.reshape(-1, 1, 1, 1)
    nodes = [
        helper.make_node("QuantizeLinear", ["spikes", "one", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero_point"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], **({"axis": 0} if per_channel else {})),
        helper.make_node("Conv", ["dq", "w", "bias"], ["current"]),
    ]
    return nodes, {
        "weight": (np.round(scaled) if dtype == np.int8 else scaled).astype(dtype),
        "scale": scale,
        "zero_point": np.zeros((), dtype),
        "bias": np.ones(4, np.float32),
    }


def half_spikes() -> tuple[list[Any], dict[str, Any]]:
    """A float16 convolution whose current reaches the neuron in float32."""
    nodes = [
        helper.make_node("Cast", ["fires"], ["half"], to=HALF),
        helper.make_node("Conv", ["half", "weight", "bias"], ["half_current"]),
        helper.make_node("Cast", ["half_current"], ["current"], to=FLOAT),
    ]
    return nodes, {"weight": np.ones((4, 4, 3, 3), np.float16), "bias": np.ones(4, np.float16)}


SYNAPSES = {
    "fp16": half_spikes(),
    "int8": quantised_spikes(np.int8, per_channel=True),
    "fp8": quantised_spikes(E4M3, per_channel=False),
}
BUILT = {"vgg-small": PRECISIONS, "wrn16-4": PRECISIONS, "vgg11": ("fp32",)}  # the last of a single step


@pytest.mark.parametrize("name", BUILT)
def test_every_kind_of_model_becomes_an_engine(name: str, tmp_path: Path) -> None:
    _, graph, _ = exported(name)
    for precision in BUILT[name]:
        save(convert(graph, precisions_of_layers(graph, precision)), tmp_path / "model.onnx")
        plan = build_engine(RTX, tmp_path / "model.onnx", (1, 8, 64))
        weights = sum(tensor.ByteSize() for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer)
        assert len(plan) > weights  # the network is in it
        check_header(plan)


def test_no_other_model_has_other_nodes() -> None:
    """What engines are built of in the test above is what every model is made of."""

    def operators(name: str) -> set[tuple[str, ...]]:
        return {(node.op_type, *sorted(node.attributes)) for node in exported(name)[1].graph}

    assert set().union(*map(operators, NAMES)) == set().union(*map(operators, BUILT))


@pytest.mark.parametrize("precision", SYNAPSES)
def test_a_spiking_layer_of_every_precision_is_parsed(precision: str, tmp_path: Path) -> None:
    """The forms an exporter may write: bool spikes cast to the synapse's type, a float32 neuron behind it."""
    synapse, constants = SYNAPSES[precision]
    nodes = [
        helper.make_node("GreaterOrEqual", ["x", "one"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["spikes"], to=FLOAT),
        *synapse,
        helper.make_node("GreaterOrEqual", ["current", "one"], ["fires_too"]),
        helper.make_node("Where", ["fires_too", "zero", "current"], ["y"]),
    ]
    floats = {"one": np.float32(1), "zero": np.float32(0)}
    model = network(tmp_path / "m.onnx", nodes, {**floats, **constants}, inputs={"x": ["batch", 4, 8, 8]})
    check_header(build_engine(RTX, model, (1, 2, 4)))


def test_a_further_input_gets_the_same_batch(tmp_path: Path) -> None:
    nodes = [helper.make_node("Greater", ["x", "noise"], ["g"]), helper.make_node("Cast", ["g"], ["y"], to=FLOAT)]
    shapes = {"x": ["batch", 3, 8, 8], "noise": ["batch", 3, 8, 8]}
    assert build_engine(RTX, network(tmp_path / "m.onnx", nodes, {}, inputs=shapes), (1, 2, 4))
    shapes["noise"] = [4, "batch", 8, 8]
    with pytest.raises(InputError, match=r"input noise.*only the first dimension may be dynamic"):
        build_engine(RTX, network(tmp_path / "m.onnx", nodes, {}, inputs=shapes), (1, 2, 4))


@pytest.mark.parametrize(
    ("nodes", "opset", "expected"),
    [
        ([helper.make_node("Foo", ["x"], ["y"], name="layer7")], 21, r"refuses node layer7 \(Foo\)"),
        ([helper.make_node("Unique", ["x"], ["y"])], 21, r"node 0 \(Unique\).*it does not have this operator"),
        ([helper.make_node("ConvInteger", ["x", "x"], ["y"])], 21, r"ConvInteger"),
        ([helper.make_node("Neg", ["x"], ["y"])], 25, "opset 25, and tensorrt-rtx reads opsets up to 24"),
    ],
)
def test_what_the_parser_refuses_is_named(nodes: list[Any], opset: int, expected: str, tmp_path: Path) -> None:
    model = network(tmp_path / "m.onnx", nodes, {}, inputs={"x": ["batch", 3, 8, 8]}, opset=opset)
    with pytest.raises(InputError, match=expected) as error:
        build_engine(RTX, model, (1, 2, 4))
    assert "\n" not in str(error.value)


def test_types_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    synapse, constants = SYNAPSES["fp16"]
    fires = helper.make_node("GreaterOrEqual", ["x", "one"], ["fires"])
    constants = {**constants, "bias": np.ones(4, np.float32), "one": np.float32(1)}
    nodes = [fires, *synapse, helper.make_node("Identity", ["current"], ["y"])]
    model = network(tmp_path / "m.onnx", nodes, constants, inputs={"x": ["batch", 4, 8, 8]})
    with pytest.raises(InputError, match=r"\(Conv\).*`bias` must be of same type"):
        build_engine(RTX, model, (1, 2, 4))


@pytest.mark.parametrize("batch", [(4, 2, 8), (0, 1, 2), (1, 9, 8), (1, 8, 10**12)])
def test_a_profile_that_makes_no_sense(batch: tuple[int, int, int], bundle: Bundle) -> None:
    with pytest.raises(InputError, match="MIN <= OPT <= MAX"):
        build_engine(RTX, bundle.variant("fp32"), batch)


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    for content, expected in ((b"not onnx", "not an ONNX file"), (b"", "at least one output")):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(InputError, match=expected):
            build_engine(RTX, tmp_path / "m.onnx", (1, 2, 4))


LEFT_BEHIND = """
import gc, sys
from pathlib import Path
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime.tensorrt import engine

made = engine.listener

def listener(trt):
    class Collecting(type(made(trt))):  # what Python may do at any allocation, at every message
        def log(self, severity, message):
            gc.isenabled() and gc.collect()
            super().log(severity, message)
    return Collecting()

engine.listener = listener
for _ in range(2):
    try:
        engine.build_engine("tensorrt-rtx", Path(sys.argv[1]), (1, 2, 4))
    except InputError as error:
        left = [error]
        left.append(left)  # a cycle: it keeps the failed build's objects until a collection
        del left
"""


def test_garbage_of_a_failed_build_does_not_stop_the_next(tmp_path: Path) -> None:
    """Collected in the middle of a message, it would wait for a lock that its own thread holds."""
    node = helper.make_node("Unique", ["x"], ["y"])
    model = network(tmp_path / "m.onnx", [node], {}, inputs={"x": ["batch", 3, 8, 8]})
    subprocess.run([sys.executable, "-c", LEFT_BEHIND, model], check=True, timeout=60)


def test_messages_become_one_line_and_full_memory_its_own_error() -> None:
    told = ["catchCudaError", "Error Code 2: OutOfMemory\n(no memory In allocate at /_src/a.cpp:12 left)"]
    assert one_line_message(told[1]) == "Error Code 2: OutOfMemory (no memory left)"
    heard = SimpleNamespace(errors=told)
    assert isinstance(failure(heard, "it failed", "buy more"), OutOfMemory)
    later = failure(heard, "it failed", "ask")  # for another reason than that
    assert "no reason was given" in str(later)
    assert not isinstance(later, OutOfMemory)
