"""Where the time of int8 inference goes, by kind of node: VGG11 in OpenVINO and onnxruntime, on several CPUs' sets of
instructions.

    python benchmarks/nodes.py      writes benchmarks/results/nodes.json and the table of benchmarks/README.md

The network and the limit are those of inference.py. `as exported`: OpenVINO on the file as it is, with unsigned
activations; `rewritten`: on what the backend makes of it. Times are taken without counters, shares from the counters
of further runs. An instruction set is what oneDNN, and so OpenVINO, may use at most; onnxruntime's kernels are its own,
so that they are counted on the machine's full set alone. Batches above 8 are computed in chunks of 8, as the backend
does.
"""

import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import onnx
from inference import request_of, write_limit
from networks import SHAPE, settled

from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import convert, plan
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import openvino_graph
from mpdsgr_deploy.runtime.openvino import CHUNK

FULL = "all of this CPU"
ISAS = {FULL: "DEFAULT", "AVX-512 without VNNI": "AVX512_CORE", "AVX2": "AVX2"}
EXPORTED, REWRITTEN, LIMIT, OTHERS = "OpenVINO, as exported", "OpenVINO, rewritten", "int8 limit", "onnxruntime"
KINDS = ("int8 products", "float32 products", "neurons", "pooling", "conversions", "copies", "other")
OF_OPENVINO = {
    **dict.fromkeys(("Subgraph", "Eltwise", "Math", "Select"), "neurons"),
    **dict.fromkeys(("AvgPool", "MaxPool"), "pooling"),
    **dict.fromkeys(("FakeQuantize", "Convert"), "conversions"),
    **dict.fromkeys(("Split", "Concatenation", "Reorder", "Transpose"), "copies"),
}
OF_ONNXRUNTIME = {
    **dict.fromkeys(("QLinearConv", "ConvInteger", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"), "int8 products"),
    **dict.fromkeys(("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"), "float32 products"),
    **dict.fromkeys(("GreaterOrEqual", "Cast", "Mul", "Sub", "Add", "Where"), "neurons"),
    **dict.fromkeys(("AveragePool", "QLinearAveragePool"), "pooling"),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "conversions"),
    **dict.fromkeys(("Split", "Concat", "QLinearConcat", "Transpose", "ReorderInput", "ReorderOutput"), "copies"),
}
Runs = Callable[[np.ndarray], Mapping[str, float]]  # one inference to seconds by kind, where it is counted


@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option("--batch", "batches", multiple=True, default=(1, 8, 32), show_default=True, type=click.IntRange(1))
@click.option("--turns", default=21, show_default=True, type=click.IntRange(3), help="Of each.")
@click.option("--counted", default=9, show_default=True, type=click.IntRange(1), help="Further runs with counters.")
def run(width: float, T: int, batches: tuple[int, ...], turns: int, counted: int) -> dict[str, Any]:
    """Time and count inferences."""
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}})
        write_networks(recipe, folder)
        measured = {
            isa: {
                str(batch): limited_to(setting, measure, folder, T, batch, threads, turns, counted, isa == FULL)
                for batch in batches
            }
            for isa, setting in ISAS.items()
        }
    setting = {"width": width, "T": T, "threads": threads, "turns": turns, "counted": counted}
    versions = {name: package_version(name) for name in ("onnxruntime", "openvino")}
    return {"setting": setting, "measured": measured, "versions": versions}


def write_networks(recipe: Recipe, folder: Path) -> None:
    """The int8 network as it is exported and as OpenVINO is given it, and the limit."""
    model = settled(recipe)
    graph = to_graph(simplify(model), SHAPE)
    save(convert(graph, plan(graph, "int8")), folder / "exported.onnx")
    write_limit(model, folder / "limit.onnx")
    unsigned, rewritten = (onnx.load(folder / "exported.onnx") for _ in range(2))
    openvino_graph.unsigned(openvino_graph.Graph(unsigned))
    onnx.save(unsigned, folder / "unsigned.onnx")
    onnx.save(openvino_graph.rewrite(rewritten), folder / "rewritten.onnx")


def limited_to(isa: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """A call's result from a process of its own in which oneDNN uses no more than an instruction set."""
    before = dict(os.environ)
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(call, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(
    folder: Path, T: int, batch: int, threads: int, turns: int, counted: int, others: bool
) -> dict[str, dict[str, Any]]:
    """By variant: seconds of inferences that took turns, and by kind of node seconds of an inference, median."""
    draw = np.random.default_rng(0)
    chunk = min(batch, CHUNK)
    images = draw.random((chunk, *SHAPE), np.float32)
    files = {EXPORTED: "unsigned", REWRITTEN: "rewritten", LIMIT: "limit"}
    inputs = dict.fromkeys(files, images)
    (row,) = (value.type.tensor_type.shape.dim[1:] for value in onnx.load(folder / "limit.onnx").graph.input)
    inputs[LIMIT] = draw.integers(0, 2, (T * chunk, *(dim.dim_value for dim in row)), np.uint8)

    def openers(count: bool) -> dict[str, Runs]:
        opened = {name: in_openvino(folder / f"{f}.onnx", inputs[name], threads, count) for name, f in files.items()}
        return opened | ({OTHERS: in_onnxruntime(folder / "exported.onnx", threads, count)} if others else {})

    def timed(name: str, infer: Runs) -> Callable[[], float]:
        x = inputs.get(name, images)
        return lambda: harness.timed(lambda: [infer(x) for _ in range(batch // chunk)])

    seconds = harness.take_turns({name: timed(name, infer) for name, infer in openers(False).items()}, turns)
    kinds = {}
    for name, infer in openers(True).items():
        x = inputs.get(name, images)
        runs = [infer(x) for _ in range(counted + 1)][1:]
        middle = {kind: statistics.median(run.get(kind, 0) for run in runs) for kind in KINDS}
        kinds[name] = {kind: round(value * batch / chunk, 7) for kind, value in middle.items()}
    return {name: {"seconds": seconds[name], "kinds": kinds[name]} for name in seconds}


def in_openvino(path: Path, x: np.ndarray, threads: int, count: bool) -> Runs:
    """A network for inputs of x's shape."""
    request = request_of(path, x.shape, threads, count=count)

    def infer(x: np.ndarray) -> Mapping[str, float]:
        request.infer([x], share_inputs=True)
        kinds = defaultdict[str, float](float)
        for node in request.profiling_info if count else ():
            if node.node_type.startswith(("Convolution", "FullyConnected")):
                kind = "int8 products" if node.exec_type.endswith("I8") else "float32 products"
            else:
                kind = OF_OPENVINO.get(node.node_type, "other")
            kinds[kind] += node.real_time.total_seconds()
        return kinds

    return infer


def in_onnxruntime(path: Path, threads: int, count: bool) -> Runs:
    """A network for any batch."""
    import onnxruntime

    def session() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = threads, count
        options.profile_file_prefix = str(path.with_suffix(""))
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    shared = session()

    def infer(x: np.ndarray) -> Mapping[str, float]:
        if not count:
            shared.run(None, {"images": x})
            return {}
        own = session()
        for _ in range(2):  # the first allocates
            own.run(None, {"images": x})
        events = [event for event in json.loads(Path(own.end_profiling()).read_text()) if event["cat"] == "Node"]
        kernels = [event for event in events if event["name"].endswith("_kernel_time")]
        kinds = defaultdict[str, float](float)
        for event in kernels[len(kernels) // 2 :]:
            kinds[OF_ONNXRUNTIME.get(event["args"]["op_name"], "other")] += event["dur"] / 1e6
        return kinds

    return infer


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    rows = []
    for isa, batches in result["measured"].items():
        for batch, variants in batches.items():
            limit = variants[LIMIT]["seconds"]
            for name, own in variants.items():
                whole = sum(own["kinds"].values())
                cells = [isa, batch, name, f"{1000 * statistics.median(own['seconds']):.1f}"]
                cells.append("" if name == LIMIT else harness.spread(limit, own["seconds"], "{:.0%}"))
                rows.append([*cells, *(f"{own['kinds'][kind] / whole:.1%}" for kind in KINDS)])
    setting, versions = result["setting"], result["versions"]
    return harness.table(
        ["instructions", "batch", "variant", "ms", "share of the int8 limit", *KINDS],
        rows,
        f"VGG11 at width {setting['width']:g}, 32x32 images, T = {setting['T']}, {setting['threads']} threads; "
        f"{harness.paired(setting['turns'])}; shares of the time in nodes, medians of {setting['counted']} "
        f"runs. onnxruntime {versions['onnxruntime']}, OpenVINO {versions['openvino']}.",
        harness.source(result),
    )


main = harness.command("nodes", run, render)

if __name__ == "__main__":
    main()
