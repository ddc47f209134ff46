"""Writes the networks of other libraries beside this file, and what their own autograd says of them.

    pip install torch onnxscript spikingjelly snntorch norse sinabs && python tests/foreign/make.py

Each is trained for a moment on scikit-learn's digits, exported by `torch.onnx.export(dynamo=True)` with a free batch,
and written as NAME.onnx beside NAME.npz: logits of 64 test digits, the gradient of their cross-entropy through the
library's own surrogate, and the versions that made both. The tests need none of these libraries.
"""

import contextlib
import io
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

HERE, T, WIDTH = Path(__file__).parent, 4, 24


class Unrolled(nn.Module):
    """Layers over T steps, their state put back before; the mean of their outputs."""

    def __init__(self, step: nn.Module, reset: object) -> None:
        super().__init__()
        self.step, self.reset = step, reset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reset(self.step)
        return torch.stack([self.step(x) for _ in range(T)]).mean(0)


def spikingjelly(**neuron: object) -> nn.Module:
    from spikingjelly.activation_based import functional, layer, surrogate
    from spikingjelly.activation_based.neuron import LIFNode, ParametricLIFNode

    kind = ParametricLIFNode if neuron.pop("learned", False) else LIFNode
    pool = neuron.pop("pool", False)

    def lif() -> nn.Module:
        own = {"init_tau" if kind is ParametricLIFNode else "tau": 2.0}
        return kind(surrogate_function=surrogate.ATan(), **own, **neuron)

    between = [layer.MaxPool2d(2)] if pool else [layer.AvgPool2d(2)]
    step = nn.Sequential(
        layer.Conv2d(1, 12, 3, padding=1), layer.BatchNorm2d(12), lif(), *between,
        layer.Conv2d(12, WIDTH, 3, padding=1), lif(), layer.AvgPool2d(2), layer.Flatten(), layer.Linear(4 * WIDTH, 10),
    )  # fmt: skip
    return Unrolled(step, functional.reset_net)


class SnnTorch(nn.Module):
    """snnTorch keeps the state outside its neurons."""

    def __init__(self, reset: str) -> None:
        super().__init__()
        import snntorch
        from snntorch import surrogate

        own = {"beta": 0.6, "spike_grad": surrogate.atan(alpha=2.0), "reset_mechanism": reset}
        self.conv, self.first = nn.Conv2d(1, 12, 3, padding=1, stride=2), snntorch.Leaky(**own)
        self.linear, self.second = nn.Linear(12 * 16, 48), snntorch.Leaky(**own)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, outputs = self.first.reset_mem(), self.second.reset_mem(), []
        for _ in range(T):
            spikes, first = self.first(self.conv(x), first)
            spikes, second = self.second(self.linear(spikes.flatten(1)), second)
            outputs.append(self.head(spikes))
        return torch.stack(outputs).mean(0)


class Norse(nn.Module):
    """Norse hands the state in and out."""

    def __init__(self) -> None:
        super().__init__()
        from norse.torch import LIFCell, LIFParameters

        own = LIFParameters(tau_mem_inv=torch.tensor(300.0), v_th=torch.tensor(0.4), alpha=torch.tensor(10.0))
        self.conv, self.first = nn.Conv2d(1, 12, 3, padding=1, stride=2), LIFCell(own)
        self.linear, self.second = nn.Linear(12 * 16, 48), LIFCell(own)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = second = None
        outputs = []
        for _ in range(2 * T):
            spikes, first = self.first(3 * self.conv(x), first)
            spikes, second = self.second(3 * self.linear(spikes.flatten(1)), second)
            outputs.append(self.head(spikes))
        return torch.stack(outputs).mean(0)


def sinabs() -> nn.Module:
    """One spike per step: neurons that fire several times a step are refused."""
    from sinabs.activation import MembraneSubtract, SingleExponential, SingleSpike
    from sinabs.layers import LIF

    class Sinabs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = {
                "tau_mem": 3.0,
                "spike_threshold": torch.tensor(0.5),
                "spike_fn": SingleSpike,
                "reset_fn": MembraneSubtract(),
                "surrogate_grad_fn": SingleExponential(grad_scale=0.5),
                "norm_input": False,
            }
            self.conv, self.first = nn.Conv2d(1, 12, 3, padding=1, stride=2), LIF(**own)
            self.linear, self.second = nn.Linear(12 * 16, 48), LIF(**own)
            self.head = nn.Linear(48, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for neurons in (self.first, self.second):
                neurons.reset_states()
            current = torch.stack([self.conv(x).flatten(1)] * T, 1)  # [B, T, ...]
            spikes = self.first(current)
            spikes = self.second(self.linear(spikes))
            return self.head(spikes).mean(1)

    return Sinabs()


NETWORKS = {
    "spikingjelly-hard": ("spikingjelly", lambda: spikingjelly(decay_input=False)),
    "spikingjelly-soft": ("spikingjelly", lambda: spikingjelly(decay_input=True, v_reset=None)),
    "spikingjelly-plif-maxpool": ("spikingjelly", lambda: spikingjelly(learned=True, pool=True)),
    "spikingjelly-detached": ("spikingjelly", lambda: spikingjelly(decay_input=False, detach_reset=True)),
    "snntorch-subtract": ("snntorch", lambda: SnnTorch("subtract")),
    "snntorch-zero": ("snntorch", lambda: SnnTorch("zero")),
    "norse-lif": ("norse", Norse),
    "sinabs-lif": ("sinabs", sinabs),
}


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    pixels = torch.from_numpy(np.rint(raw.images[order] * (255 / 16)).astype(np.float32)[:, None] / 255)
    classes = torch.from_numpy(raw.target[order].astype(np.int64))
    return pixels[:1300], classes[:1300], pixels[1300:], classes[1300:]


def train(network: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 12) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(5 * network(x[rows]), y[rows]).backward()
            optimizer.step()


def main(names: list[str]) -> None:
    x, y, test, classes = digits()
    for name in names or NETWORKS:
        library, build = NETWORKS[name]
        torch.manual_seed(0)
        network = build().train()
        train(network, x, y)
        network.eval()
        images = test[:64].clone().requires_grad_()
        logits = network(images)
        F.cross_entropy(logits, classes[:64], reduction="sum").backward()
        with torch.no_grad():
            accuracy = (network(test).argmax(1) == classes).float().mean().item()
            network(test[:3])  # sinabs keeps its state: of another batch, so that it is made anew, and a small one
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (test[:2],), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"], output_names=["logits"], opset_version=18, verbose=False,
            )  # fmt: skip
        for value in (program.model.graph, *program.model.graph):
            value.metadata_props.clear()
            value.doc_string = None
        program.save(HERE / f"{name}.onnx")
        arrays = {
            "images": images.detach(),
            "classes": classes[:64],
            "logits": logits.detach(),
            "gradient": images.grad,
        }
        versions = np.array([f"{package} {version(package)}" for package in ("torch", library)])
        np.savez_compressed(HERE / f"{name}.npz", accuracy=accuracy, versions=versions, **arrays)
        print(f"{name}: accuracy {accuracy:.3f}, {(HERE / f'{name}.onnx').stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
