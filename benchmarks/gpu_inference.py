"""What runs a network fastest on a GPU, and whether it still answers as torch does: a step of gpu.py.

VGG11 as torch runs it, eagerly and compiled, as onnxruntime runs its ONNX file with the CUDA and the TensorRT provider,
as TensorRT and TensorRT-RTX run it themselves in every precision, and, where it is installed, the same architecture in
SpikingJelly. Every one takes host memory and gives host memory, copies included. Weights are random, of a fixed seed,
with tdBN settled on random images. What this machine cannot run is noted with its reason.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import harness
import machine
import numpy as np
import onnx
import onnx_ir as ir
import torch
from networks import SHAPE, settled

from mpdsgr_deploy.diagnostics.operation_counts import macs
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert, plan
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import fold_norm, simplify
from mpdsgr_deploy.onnx_files import INPUT
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.tensorrt import TensorRT, build_engine, cuda
from mpdsgr_deploy.runtime.torch_model import TorchModel, exact_convolutions

REFERENCE = "torch"
Note = Callable[..., None]  # of what was measured, and its figures
Opener = Callable[[SpikingNet, Path, Sequence[int], ExitStack], Predictor]


def measure(note: Note, recipe: Recipe, batches: Sequence[int], repetitions: int, backends: dict[str, Opener]) -> None:
    """Note seconds, parity and, where a backend cannot run, the reason, for every batch and backend."""
    model = settled(recipe)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "model.onnx"
        save(to_graph(simplify(model.cpu()), SHAPE), path)
        running, refused = opened(backends, model, path, batches, stack)
        for name, why in refused.items():
            note(name, refused=why)
        flops, peak = 2 * macs(onnx.load(path), recipe.encoding.T).naive, gemm_flops()
        for n in batches:
            outcomes = compared(running, draw.random((n, *SHAPE), np.float32), repetitions)
            for name, outcome in outcomes.items():
                if "seconds" in outcome:
                    seconds, parity = statistics.median(outcome.pop("seconds")), outcome.pop("parity")
                    rows, labels = n - parity["within_tolerance"], parity["labels_differ"]
                    outcome |= {"ms": 1000 * seconds, "times_torch": statistics.median(outcome.pop("ratios"))}
                    outcome |= {"share_of_fp32_product": flops * n / seconds / peak}
                    outcome |= {"rows_differ": rows, "labels_differ": labels}
                note(f"{name}, batch {n}", **outcome)


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
        ratios = [a / b for a, b in zip(seconds[REFERENCE], seconds[name], strict=True)]
        parity = compare(answers[REFERENCE], logits).model_dump()
        outcomes[name] = {"seconds": seconds[name], "ratios": ratios, "parity": parity}
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
REHEARSED = {
    REFERENCE: eager,
    "onnxruntime-cpu, fp32": onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cpu, int8": onnxruntime("CPUExecutionProvider", "int8"),
    "tensorrt, fp32": tensorrt("tensorrt", "fp32"),
}
