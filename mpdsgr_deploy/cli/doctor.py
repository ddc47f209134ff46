"""mpdsgr doctor"""

import tempfile
from pathlib import Path

import click
import numpy as np
import onnx

from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.provenance import package_version, provenance
from mpdsgr_deploy.runtime import OnnxRuntime

EXTRAS = {
    "train": ("torch", "torchvision", "lightning", "tensorboard", "safetensors", "onnxscript", "scikit-learn"),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "report": ("matplotlib", "jinja2"),
    "parquet": ("pyarrow",),
}


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what is installed, and which backends really work here: each runs a small network.

    \b
    Example:
      mpdsgr doctor
    """
    packages = {extra: {name: package_version(name) for name in names} for extra, names in EXTRAS.items()}
    backends = {
        "onnxruntime-cpu": try_onnxruntime("CPUExecutionProvider"),
        "onnxruntime-cuda": try_onnxruntime("CUDAExecutionProvider"),
        "torch": try_torch(),
    }
    if as_json:
        print_json({"backends": backends, "packages": packages, **provenance()})
        return
    print_table(("backend", "state"), list(backends.items()), "Backends")
    rows = [(f"[{e}]", ", ".join(f"{n} {v or 'missing'}" for n, v in found.items())) for e, found in packages.items()]
    print_table(("extra", "packages"), rows, "Packages")
    machine = provenance()
    hardware = ", ".join(f"{name} {value}" for name, value in machine["hardware"].items())
    click.echo(f"mpdsgr-deploy {machine['mpdsgr_deploy']}, Python {machine['python']}, {hardware}")


def try_onnxruntime(provider: str) -> str:
    """Run x + x on a provider: 'works', or why it does not."""
    shape = ("batch", 1, 1, 1)
    add = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in "xy")
    graph = onnx.helper.make_graph([add], "doctor", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doctor.onnx"
        onnx.save(model, path)
        try:
            with OnnxRuntime(path, provider) as session:
                answer = session(np.full((2, 1, 1, 1), 0.25, np.float32))
        except InputError as error:
            return f"no: {error}"
    return "works" if (answer == 0.5).all() else f"no: computed {answer.ravel().tolist()} instead of 0.5"


def try_torch() -> str:
    """Run x + x in torch, on the GPU if there is one."""
    try:
        torch = need("torch", "train")
    except InputError as error:
        return f"no: {error}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answer = torch.full((2,), 0.25, device=device) * 2
    return f"works on {device}" if (answer == 0.5).all().item() else f"no: computed {answer.tolist()} instead of 0.5"
