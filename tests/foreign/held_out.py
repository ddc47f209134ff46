"""Runs the recipes of export/ADOPT.md, and holds adopted networks against AutoAttack on the libraries' own modules.

    python -m venv other && other/bin/pip install -e '.[cpu]' -r tests/foreign/requirements.txt
    other/bin/python tests/foreign/held_out.py        writes held_out.json beside this file, in one run

Every recipe's network is trained on scikit-learn's digits, exported as the page says and adopted by the command, with
the library's own logits as its reference. AutoAttack's standard version then attacks the library's torch module, with
the library's surrogate and reset, on the same images at the same eps; what it leaves is compared with `worst`.
"""

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make import digits, train
from recipe_text import digest, export_call, recipes
from recording import record
from torch import nn

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.runtime import open_predictor

LIBRARIES = ("spikingjelly", "snntorch", "norse", "sinabs")
NIR, EPS, SEED = "A .nir file", 8 / 255, 0


def build(code: str) -> nn.Module:
    """The network of a recipe."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["network"]


def nir_file(folder: Path) -> None:
    """A network that SpikingJelly trained, as net.nir."""
    import nir
    from spikingjelly.activation_based import functional, layer, neuron, nir_exchange, surrogate

    def lif() -> nn.Module:
        return neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=surrogate.ATan())

    step = nn.Sequential(
        layer.Conv2d(1, 12, 3, padding=1), lif(), layer.AvgPool2d(2), layer.Conv2d(12, 24, 3, padding=1), lif(),
        layer.AvgPool2d(2), layer.Flatten(), layer.Linear(96, 10),
    )  # fmt: skip

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = step

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            functional.reset_net(self.step)
            return torch.stack([self.step(x) for _ in range(4)]).mean(0)

    x, y, test, _ = digits()
    train(Unrolled().train(), x, y, epochs=30)
    functional.reset_net(step)
    nir.write(folder / "net.nir", nir_exchange.export_to_nir(step.eval(), test[:2], dt=1e-4))
    functional.reset_net(step)


def robust(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Images that AutoAttack's standard version leaves correct."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(network, norm="Linf", eps=EPS, version="standard", device="cpu", seed=SEED)
    with contextlib.redirect_stdout(io.StringIO()):
        adversarial = attack.run_standard_evaluation(x, y)
    adversarial = adversarial[0] if isinstance(adversarial, tuple) else adversarial
    assert (adversarial - x).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        return int((network(adversarial).argmax(1) == y).sum())


def hold(name: str, code: str, n: int, tier: str) -> dict[str, Any]:
    """One recipe, from training to the comparison with AutoAttack."""
    surrogate = re.search(r"--surrogate (\S+)", code)
    assert surrogate is not None
    x, y, test, classes = digits()
    test, classes = test[:n], classes[:n]
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if name == NIR:
            nir_file(Path(folder))
            network = build(code)
        else:
            network = build(code).train()
            train(network, x, y)
        network.eval()
        with torch.no_grad():
            logits = network(test)
            network(test[:3])  # sinabs: see the page
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                exec(export_call(), {"network": network})
        np.savez("logits.npz", logits=logits.numpy())
        words = ["adopt", "net.onnx", "--images", "digits", "--limit", n, "--surrogate", surrogate[1], "--tier", tier]
        words += ["--reference", "logits.npz", "--out", "bundle"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mpdsgr_deploy", *map(str, words)], check=True)
        seconds = time.perf_counter() - started
        bundle = open_bundle(Path("bundle"))
        with open_predictor(bundle) as predictor:
            answers = predictor(test.numpy())
        reference = bundle.manifest.reference
        assert reference is not None
        started = time.perf_counter()
        left = robust(network, test, classes)
        return {
            "surrogate": surrogate[1],
            "clean": {"library": int((logits.argmax(1) == classes).sum()), "bundle": reference.correct["clean"]},
            "largest difference of logits": float(np.abs(answers - logits.numpy()).max()),
            "worst": reference.correct["worst"],
            "autoattack": left,
            "seconds": {"adopt": round(seconds), "autoattack": round(time.perf_counter() - started)},
            "code_sha256": digest(code),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tier", default="release")
    options = parser.parse_args()
    setting = {"n": options.images, "tier": options.tier, "eps": EPS, "seed": SEED, "threads": torch.get_num_threads()}
    cases = {name: partial(hold, name, code, options.images, options.tier) for name, code in recipes().items()}
    record("held_out", setting, cases, ("torch", "nir", "pyautoattack", *LIBRARIES))


if __name__ == "__main__":
    main()
