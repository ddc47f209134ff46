"""Adopts torchvision's ResNet-18 with an int8 variant of onnxruntime's; writes resnet18.json beside this file.

    python tests/foreign/resnet18.py

The network is trained on scikit-learn's digits, enlarged to 32x32 in three channels, and exported as export/ADOPT.md
says. onnxruntime's `quantize_static` makes the int8 file. Both go through `adopt` and `validate` unchanged; what int8
lost under attack is read from its report.
"""

import argparse
import contextlib
import io
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
import torchvision
from make import digits
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from recording import record
from torch.nn import functional as F

from mpdsgr_deploy.validation.report import load_report

SEED, EPS, EPOCHS, SIZE = 0, "8/255", 4, 32


class Calibration(CalibrationDataReader):
    """Images for onnxruntime's quantiser."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = iter([{"images": images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def enlarged(x: torch.Tensor) -> torch.Tensor:
    """Digits [B, 1, 8, 8] as [B, 3, 32, 32], on the 8-bit grid."""
    return torch.round(F.interpolate(x, SIZE, mode="bilinear").clamp(0, 1) * 255).div(255).expand(-1, 3, -1, -1)


def trained(x: torch.Tensor, y: torch.Tensor) -> torch.nn.Module:
    """ResNet-18 after some epochs."""
    torch.manual_seed(SEED)
    network = torchvision.models.resnet18(weights=None, num_classes=10).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network.eval()


def mpdsgr(*words: object) -> int:
    return subprocess.run([sys.executable, "-m", "mpdsgr_deploy", *map(str, words)], check=False).returncode


def gated(n: int, tier: str) -> dict[str, Any]:
    """ResNet-18 from training to the report on its int8 variant."""
    x, y, test, classes = digits()
    x, test = enlarged(x), enlarged(test[:n])
    network = trained(x, y)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                network, (x[:2],), "net.onnx", dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"], output_names=["logits"], external_data=False,
            )  # fmt: skip
        quantize_static("net.onnx", "int8.onnx", Calibration(x[:100].numpy()))
        pixels = np.rint(test.numpy() * 255).astype(np.uint8)
        np.savez("images.npz", pixels=pixels, classes=classes[:n].numpy())
        words = ["--images", "images.npz", "--variant", "int8=int8.onnx", "--set", f"attack.eps={EPS}", "--tier", tier]
        started = time.perf_counter()
        adopt = mpdsgr("adopt", "net.onnx", *words, "--out", "bundle")
        result: dict[str, Any] = {"adopt": adopt, "seconds": round(time.perf_counter() - started)}
        same = Path("bundle/model.fp32.onnx").read_bytes() == Path("net.onnx").read_bytes()
        Path("gate.toml").write_text(f'tier = "{tier}"\nimages = {n}\nmax_drop = 0.2\n')
        for precision in ("fp32", "int8"):
            words = ["validate", "bundle", "--precision", precision, "--gate", "gate.toml"]
            ended = mpdsgr(*words, "--report", f"report-{precision}")
            rows = {name: load_report(Path(f"report-{precision}")).row(name) for name in ("clean", "worst")}
            result[precision] = {"ended": ended}
            for name, row in rows.items():
                assert row is not None
                assert row.reference is not None
                own, other = row.artefact.verdicts(row.n), row.reference.verdicts(row.n)
                lost = np.flatnonzero(other & ~own).tolist()
                gained = np.flatnonzero(own & ~other).tolist()
                result[precision][name] = {"correct": int(own.sum()), "lost": lost, "gained": gained}
    return {"file byte for byte": same} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--tier", default="release")
    options = parser.parse_args()
    setting = {"n": options.images, "tier": options.tier, "eps": EPS, "seed": SEED, "epochs": EPOCHS}
    cases = {"resnet18": partial(gated, options.images, options.tier)}
    record("resnet18", setting, cases, ("torch", "torchvision", "onnxscript"))


if __name__ == "__main__":
    main()
