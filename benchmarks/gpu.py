"""What runs a network fastest on a GPU, and whether it still answers as torch does.

    python benchmarks/gpu.py      writes benchmarks/results/gpu.json and the table of benchmarks/README.md

VGG11 as torch runs it, eagerly and compiled, as onnxruntime runs its ONNX file with the CUDA and the TensorRT provider,
as TensorRT and TensorRT-RTX run it themselves in every precision, and, where it is installed, the same architecture in
SpikingJelly. Every one takes host memory and gives host memory, copies included. The table shows the paired ratios to
eager torch, the share that the network's multiplications reach of the GPU's measured float32 matrix product, and the
rows and labels that differ from eager torch. Weights are random, of a fixed seed, with tdBN settled on random images.
What this machine cannot run stands in the results with its reason.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import harness
import machine
import numpy as np
import onnx
import onnx_ir as ir
import torch
from networks import SHAPE, settled

from mpdsgr_deploy.diagnostics.cost import macs
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert, plan
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import fold_norm, simplify
from mpdsgr_deploy.onnx_files import INPUT
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.provenance import package_version
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.tensorrt import TensorRT, build_engine, cuda
from mpdsgr_deploy.runtime.torch_model import TorchModel, exact_convolutions

REFERENCE = "torch"
PACKAGES = ("cuda-bindings", "onnxruntime", "onnxruntime-gpu", "spikingjelly", "tensorrt", "tensorrt-rtx", "torch")
Opener = Callable[[SpikingNet, Path, Sequence[int], ExitStack], Predictor]


@click.option("--width", default=1.0, show_default=True, help="Of VGG11.")
@click.option("--steps", "T", default=8, show_default=True, help="Time steps T.")
@click.option(
    "--batch", "batches", multiple=True, default=(1, 32, 256, 1024), show_default=True, type=click.IntRange(1)
)
@click.option("--repetitions", default=30, show_default=True, type=click.IntRange(2), help="Timed runs of each.")
def run(width: float, T: int, batches: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    """Time what runs a network on a GPU, and compare its answers. Needs a GPU."""
    if not torch.cuda.is_available():
        click.echo("error: no GPU here; run this on a machine with an NVIDIA GPU and a CUDA build of torch", err=True)
        sys.exit(2)
    recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}})
    return measure(recipe, sorted(batches), repetitions, BACKENDS)


def measure(recipe: Recipe, batches: Sequence[int], repetitions: int, backends: dict[str, Opener]) -> dict[str, Any]:
    """Seconds, parity and, where a backend cannot run, the reason, for every backend and batch."""
    model = settled(recipe)
    draw = np.random.default_rng(0)
    images = {n: draw.random((n, *SHAPE), np.float32) for n in batches}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "model.onnx"
        save(to_graph(simplify(model.cpu()), SHAPE), path)
        running, refused = opened(backends, model, path, batches, stack)
        result = {
            "setting": {**recipe.model.model_dump(), "T": recipe.encoding.T, "batches": list(batches)},
            "multiplications": macs(onnx.load(path), recipe.encoding.T).naive,
            "gemm_flops": gemm_flops(),
            "refused": refused,
            "batches": {str(n): compared(running, x, repetitions) for n, x in images.items()},
        }
    versions = {name: version for name in PACKAGES if (version := package_version(name))}
    return {**result, "versions": versions}


def opened(
    backends: dict[str, Opener], model: SpikingNet, path: Path, batches: Sequence[int], stack: ExitStack
) -> tuple[dict[str, Predictor], dict[str, str]]:
    """The predictors that work here, each shown by its answer to one image, and why the others do not."""
    running, refused = {}, {}
    for name, opener in backends.items():
        try:
            predictor = opener(model, path, batches, stack)
            predictor(np.full((1, *SHAPE), 0.5, np.float32))
        except Exception as error:  # whatever another library raises is the finding
            refused[name] = reason(error)
        else:
            running[name] = predictor
    return running, refused


def compared(running: dict[str, Predictor], x: np.ndarray, repetitions: int) -> dict[str, Any]:
    """Of each predictor: seconds [repetitions], taken in turns, and how its answers differ from the reference's.

    Of one that fails at this batch, its memory too small perhaps: the reason.
    """
    answers, outcomes = {}, {}
    for name, predictor in running.items():
        try:
            answers[name] = predictor(x)
        except Exception as error:  # whatever another library raises is the finding
            outcomes[name] = {"refused": reason(error)}
    if REFERENCE not in answers:
        raise InputError(
            f"torch cannot run a batch of {len(x)}: {outcomes[REFERENCE]['refused']}; use a smaller --batch"
        )
    contenders = {name: partial(harness.timed, partial(running[name], x)) for name in answers}
    seconds = harness.take_turns(contenders, repetitions, warm_up=3)  # compiles kernels, captures graphs
    for name, logits in answers.items():
        outcomes[name] = {"seconds": seconds[name], "parity": compare(answers[REFERENCE], logits).model_dump()}
    return outcomes


def reason(error: Exception) -> str:
    """Why something did not run, in one line."""
    return one_line(error)[:300]


def gemm_flops() -> float:
    """Operations a second of the device's float32 matrix product, TF32 off."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 256)
    with exact_products():
        return machine.product_rate("fp32", device, size, repetitions=10)


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 matrix products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def eager(model: SpikingNet, path: Path, batches: Sequence[int], stack: ExitStack) -> Predictor:
    """Torch, operation by operation."""
    return TorchModel(model, SHAPE)


def compiled(model: SpikingNet, path: Path, batches: Sequence[int], stack: ExitStack) -> Predictor:
    """torch.compile with CUDA graphs, one compilation a batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = torch.compile(model.to(device), mode="reduce-overhead", dynamic=False)

    def predict(x: np.ndarray, /) -> np.ndarray:
        with torch.no_grad(), exact_convolutions():
            return run(torch.from_numpy(x).to(device)).cpu().numpy()

    return predict


def in_precision(path: Path, precision: str) -> Path:
    """The float32 ONNX file in another precision, beside it."""
    network = ir.load(path)
    file = path.with_name(f"{precision}.onnx")
    save(convert(network, plan(network, precision)), file)
    return file


def onnxruntime(provider: str, precision: str = "fp32") -> Opener:
    """The ONNX file on a provider, which must be the one that is used."""

    def opener(model: SpikingNet, path: Path, batches: Sequence[int], stack: ExitStack) -> Predictor:
        return stack.enter_context(OnnxRuntime(in_precision(path, precision), provider))

    return opener


def tensorrt(backend: str, precision: str) -> Opener:
    """An engine of the ONNX file, built here."""

    def opener(model: SpikingNet, path: Path, batches: Sequence[int], stack: ExitStack) -> Predictor:
        profile = (1, batches[len(batches) // 2], batches[-1])
        built = build_engine(backend, in_precision(path, precision), profile)
        engine = cuda.Engine(backend, built, "run the benchmark again")
        stream = lambda: cuda.CudaStream(engine, profile[2])  # noqa: E731
        return stack.enter_context(TensorRT(stream, profile, SHAPE, INPUT))

    return opener


def spikingjelly(model: SpikingNet, path: Path, batches: Sequence[int], stack: ExitStack) -> Predictor:
    """The same layers with SpikingJelly's LIF nodes and our weights, normalisation folded into them."""
    try:
        from spikingjelly.activation_based import functional, layer, neuron
    except ImportError as error:
        raise InputError(f"spikingjelly is not installed ({error})") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = simplify(model, [fold_norm]).to(device)
    settings = net.layers()[0].neuron
    modules: list[torch.nn.Module] = []
    for part in net.body:
        synapse = getattr(part, "synapse", None)
        if synapse is None:
            modules.append(layer.SeqToANNContainer(part))
            continue
        modules.append(layer.SeqToANNContainer(synapse))
        node = neuron.LIFNode(  # u = (1 - 1/tau) u + x, its decay_input=False
            tau=1 / (1 - float(settings.tau)), decay_input=False, v_threshold=settings.v_threshold, v_reset=0.0
        )
        modules.append(node)
    body = torch.nn.Sequential(*modules)
    functional.set_step_mode(body, "m")

    def predict(x: np.ndarray, /) -> np.ndarray:
        functional.reset_net(body)
        with torch.no_grad(), exact_convolutions():
            steps = net.encode(torch.from_numpy(x).to(device), net.normalize, None)
            return net.readout(body(steps)).cpu().numpy()

    return predict


BACKENDS: dict[str, Opener] = {
    REFERENCE: eager,
    "torch.compile": compiled,
    "spikingjelly": spikingjelly,
    "onnxruntime-cuda, fp32": onnxruntime("CUDAExecutionProvider"),
    "onnxruntime-cuda, fp16": onnxruntime("CUDAExecutionProvider", "fp16"),
    "onnxruntime-tensorrt, fp32": onnxruntime("TensorrtExecutionProvider"),
    **{f"{b}, {p}": tensorrt(b, p) for b in ("tensorrt", "tensorrt-rtx") for p in PRECISIONS},
}


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with its setting, and what did not run."""
    rows = []
    for n, outcomes in result["batches"].items():
        for name, outcome in outcomes.items():
            if "refused" in outcome:
                rows.append([n, name, outcome["refused"], "", "", "", ""])
                continue
            median, parity = statistics.median(outcome["seconds"]), outcome["parity"]
            share = 2 * result["multiplications"] * int(n) / median / result["gemm_flops"]
            ratio = harness.spread(outcomes[REFERENCE]["seconds"], outcome["seconds"])
            cells = [n, name, f"{1000 * median:.3f}", ratio, f"{100 * share:.1f}"]
            rows.append([*cells, f"{int(n) - parity['within_tolerance']} of {n}", parity["labels_differ"]])
    setting, (some, *_) = result["setting"], result["batches"].values()
    turns = len(some[REFERENCE]["seconds"])
    return harness.table(
        ["batch", "backend", "ms", "times torch", "% of GEMM", "rows that differ", "labels that differ"],
        rows,
        f"{setting['name']} at width {setting['width']}, T = {setting['T']}; medians [{harness.interval(turns)[1]:.0%} "
        f"interval] of {turns} paired turns; higher is faster in `times torch`.",
        "",
        *(f"- {name} did not run: {why}" for name, why in result["refused"].items()),
        "",
        harness.source(result),
    )


main = harness.command("gpu", run, render)

if __name__ == "__main__":
    main()
