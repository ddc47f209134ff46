"""How fast a CPU runs VGG11: SpikingJelly, torch, onnxruntime and OpenVINO in turns, and what its int8 units allow.

    python benchmarks/inference.py      writes benchmarks/results/inference.json and the table of benchmarks/README.md

The whole network of the paper (T = 8, 32x32 images, two hidden layers of 4096) with random weights. `int8 limit` is
OpenVINO on nothing but the network's int8 products, on T * B rows, each followed by a rounding to 8 bits: what a
network without neurons would take. The peers, SpikingJelly, snnTorch and a plain loop in torch, are processes of their
own, each eager and compiled with channels last, in float32 and in bf16.
"""

import math
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import onnx
import torch
from networks import SHAPE, settled
from onnx import helper, numpy_helper
from workers import VERSIONS, Worker, worker

from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import FORMATS, convert, plan, rounded_weights
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.openvino import EXACT, OpenVino
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.snn import SpikingLayer

INT8, LIMIT = "OpenVINO, int8", "int8 limit"
BOTH = ("fp32", "bf16")
PEERS = {  # name of its worker: title, precisions
    "spikingjelly": ("SpikingJelly, eager", BOTH),
    "spikingjelly-compiled": ("SpikingJelly, compiled", BOTH),
    "spikingjelly-onnx": ("SpikingJelly, exported, onnxruntime", ("fp32",)),
    "snntorch": ("snnTorch, eager", BOTH),
    "snntorch-compiled": ("snnTorch, compiled", BOTH),
    "plain": ("plain torch, eager", BOTH),
    "plain-compiled": ("plain torch, compiled", BOTH),
}
Inference = Callable[[int], float]  # batch to seconds


@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option("--batch", "batches", multiple=True, default=(1, 8, 32), show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=60.0, show_default=True, help="Of taking turns at each batch.")
def run(width: float, T: int, batches: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Time batches of inferences."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        variants: dict[str, Inference] = {}
        for name, (title, precisions) in PEERS.items():
            peer = stack.enter_context(worker(name, width, T, threads, "cpu"))
            variants |= {f"{title}, {p}": partial(peer_seconds, peer, p) for p in precisions}
        peers = [*variants]
        recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}})
        variants |= ours(settled(recipe), T, threads, Path(folder), stack)
        measured = {str(batch): measure(variants, batch, seconds) for batch in batches}
    setting = {"width": width, "T": T, "threads": threads}
    versions = {name: package_version(name) for name in ("torch", "onnxruntime", "openvino")} | VERSIONS
    return {"setting": setting, "peers": peers, "seconds": measured, "versions": versions}


def peer_seconds(peer: Worker, precision: str, batch: int) -> float:
    return peer("infer", batch, precision)["seconds"]


def ours(model: SpikingNet, T: int, threads: int, folder: Path, stack: ExitStack) -> dict[str, Inference]:
    """Every variant that runs this network, and the limit."""
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "int8", "limit")}
    graph = to_graph(simplify(model), SHAPE)
    save(graph, paths["fp32"])
    save(convert(graph, plan(graph, "int8")), paths["int8"])
    rows = write_limit(model, paths["limit"])
    settings = RuntimeSettings(threads=threads)
    predictors = {
        "torch, eager": TorchModel(model, SHAPE),
        "onnxruntime, fp32": OnnxRuntime(paths["fp32"], settings=settings),
        "OpenVINO, fp32": OpenVino(paths["fp32"], settings=settings),
        INT8: OpenVino(paths["int8"], settings=settings),
    }

    def inference(predictor: Any) -> Inference:
        images = np.random.default_rng(0).random((64, *SHAPE), np.float32)
        return lambda batch: harness.timed(lambda: predictor(images[:batch]))

    return {
        **{name: inference(stack.enter_context(p)) for name, p in predictors.items()},
        LIMIT: limit(paths["limit"], T, threads, rows),
    }


def write_limit(model: SpikingNet, path: Path) -> tuple[int, ...]:
    """The network's int8 products alone, each followed by a rounding to uint8; returns the shape of a row of its input.

    Without the first layer, whose input is an image, and the last, as in the int8 network itself.
    """
    first, *body = model.body
    assert isinstance(first, SpikingLayer)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {"scale": np.float32(1 / 8), "zero": np.uint8(0)}
    value, row = "rows", (first.synapse.out_channels, *SHAPE[1:])

    def add(op: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{op}{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def constant(array: np.ndarray) -> str:
        name = f"constant{len(constants)}"
        constants[name] = array
        return name

    value = add("DequantizeLinear", [value, "scale", "zero"])
    for module in body:
        if isinstance(module, torch.nn.AvgPool2d):
            value = add("MaxPool", [value], kernel_shape=[2, 2], strides=[2, 2])  # which stays in 8 bits
        elif isinstance(module, torch.nn.Flatten):
            value = add("Flatten", [value])
        else:
            synapse = module.synapse
            values, scales = rounded_weights(synapse.weight.detach().numpy(), FORMATS["int8"], np.dtype(np.float32))
            inputs = [constant(values), constant(scales), constant(np.zeros(len(scales), np.int8))]
            weights = add("DequantizeLinear", inputs, axis=0)
            if isinstance(synapse, torch.nn.Conv2d):
                value = add("Conv", [value, weights], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
            else:
                value = add("MatMul", [value, add("Transpose", [weights], perm=[1, 0])])
            value = add("QuantizeLinear", [value, "scale", "zero"])
            value = add("DequantizeLinear", [value, "scale", "zero"])
    nodes[-1].output[0] = "answers"
    graph = helper.make_graph(
        nodes,
        "limit",
        [helper.make_tensor_value_info("rows", onnx.TensorProto.UINT8, ["batch", *row])],
        [helper.make_tensor_value_info("answers", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return row


def limit(path: Path, T: int, threads: int, row: tuple[int, ...]) -> Inference:
    """OpenVINO on the products, on T rows an image."""
    requests: dict[int, Any] = {}

    def infer(batch: int) -> float:
        rows = np.random.default_rng(0).integers(0, 2, (T * batch, *row), np.uint8)
        if batch not in requests:
            requests[batch] = request_of(path, rows.shape, threads)
        return harness.timed(lambda: requests[batch].infer([rows], share_inputs=True))

    return infer


def request_of(path: Path, shape: tuple[int, ...], threads: int, *, count: bool = False) -> Any:
    """OpenVINO's inference request for a file as it is and inputs of one shape. count: with the time of every node."""
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    network.reshape([*shape])
    options = {**EXACT, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": count}
    return core.compile_model(network, "CPU", options).create_infer_request()


def measure(variants: dict[str, Inference], batch: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each variant's inferences, two at least; warming up compiles and allocates."""
    contenders = {name: partial(infer, batch) for name, infer in variants.items()}
    harness.take_turns(contenders, 0)
    turn = harness.timed(lambda: harness.take_turns(contenders, 1, warm_up=0))
    return harness.take_turns(contenders, max(2, math.ceil(seconds / turn)), warm_up=0)


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting."""
    rows = []
    for batch, samples in result["seconds"].items():
        best = min(result["peers"], key=lambda name: statistics.median(samples[name]))
        for name, seconds in samples.items():
            middle = statistics.median(seconds)
            cells = [batch, name, f"{1000 * middle:.1f}", f"{int(batch) / middle:.0f}"]
            cells.append("" if name == LIMIT else harness.spread(samples[best], seconds, "{:.1f}"))
            rows.append([*cells, harness.spread(samples[LIMIT], seconds, "{:.0%}") if name == INT8 else ""])
    counts = {batch: len(samples[INT8]) for batch, samples in result["seconds"].items()}
    turns = ", ".join(f"{n} at batch {batch}" for batch, n in counts.items())
    least = min(harness.interval(n)[1] for n in counts.values())
    setting, versions = result["setting"], result["versions"]
    return harness.table(
        ["batch", "variant", "ms", "images/s", "times the best peer", "share of the int8 limit"],
        rows,
        f"VGG11 at width {setting['width']:g}, 32x32 images, T = {setting['T']}, {setting['threads']} threads; "
        f"medians [interval of at least {least:.0%}] of paired turns: {turns}. onnxruntime {versions['onnxruntime']}, "
        f"OpenVINO {versions['openvino']}, SpikingJelly {versions['spikingjelly']}, snnTorch {versions['snntorch']}.",
        harness.source(result),
    )


main = harness.command("inference", run, render)

if __name__ == "__main__":
    main()
