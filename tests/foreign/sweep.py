"""Sweeps torchvision's classifiers through `adopt --check` and the attack graph; writes sweep.json beside this file.

    python tests/foreign/sweep.py

Each family's smallest network, of random weights and with statistics of its batch normalisations from random images,
is exported as export/ADOPT.md says. Its gradient through the attack graph is compared, image by image, with torch's in
float64. Float32 itself decides a few of the many thousand comparisons of such a network (a ReLU at 0, equal values
under a MaxPool) otherwise than float64, and each of them moves the gradient by a percent or so: torch's own float32
gradient is measured beside ours, and an operator that is wrong would show in every image.
"""

import argparse
import contextlib
import copy
import io
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from recording import record
from torch import nn
from torch.nn import functional as F

from mpdsgr_deploy.adoption import read_classifier, survey
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker

SEED, CLASSES = 0, 10
# The smallest network of each family, with the size of its images where the family fixes one
FAMILIES: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "vgg11_bn": {},
    "resnet18": {},
    "squeezenet1_1": {},
    "densenet121": {},
    "inception_v3": {"size": 96, "aux_logits": False, "init_weights": False},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "shufflenet_v2_x0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "resnext50_32x4d": {},
    "wide_resnet50_2": {},
    "mnasnet0_5": {},
    "efficientnet_b0": {},
    "regnet_y_400mf": {},
    "convnext_tiny": {},
    "vit_b_16": {"image_size": 64},
    "swin_t": {},
    "maxvit_t": {"size": 224, "input_size": (224, 224)},
}
SIZE = 64


def settled(name: str, size: int, options: dict[str, Any]) -> nn.Module:
    """A network whose batch normalisations have seen some images, since with their initial statistics signals vanish,
    and whose last layer is not zero, as ViT's is at first.
    """
    torch.manual_seed(SEED)
    network = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
    with torch.no_grad():
        network.train()(torch.rand(4, 3, size, size))
    return network.eval()


def gradient(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Of each image's cross-entropy, by autograd in the type of x."""
    x = x.clone().requires_grad_()
    F.cross_entropy(network(x), y, reduction="sum").backward()
    assert x.grad is not None
    return x.grad.numpy()


def errors(found: np.ndarray, exact: np.ndarray) -> list[float]:
    """The largest error of each image's gradient, relative to its largest entry."""
    axes = (1, 2, 3)
    return (np.abs(found - exact).max(axes) / np.abs(exact).max(axes)).tolist()


def swept(name: str, n: int) -> dict[str, Any]:
    """One network: whether it is adopted, and how far its gradients are from torch's."""
    options = dict(FAMILIES[name])
    size = options.pop("size", SIZE)
    network = settled(name, size, options)
    x, y = torch.rand(n, 3, size, size), torch.arange(n) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network, (x[:2],), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"], output_names=["logits"], external_data=False,
            )  # fmt: skip
        seen = survey(read_classifier(file).network, "triangle")
        operators = sorted({finding.operator for finding in seen.findings})
        result = {"size": size, "refused": seen.refused, "nodes": dict(seen.counts()), "operators": operators}
        if seen.refused:
            return result
        with GraphAttacker(file, "triangle") as attacker:
            ours = attacker(x.numpy(), y.numpy())
    with torch.no_grad():
        logits = network(x).numpy()
    single = gradient(network, x, y)
    exact = gradient(copy.deepcopy(network).double(), x.double(), y)
    return result | {
        "largest difference of logits": float(np.abs(ours.logits - logits).max() / np.abs(logits).max()),
        "gradient errors": errors(ours.gradient, exact),
        "gradient errors of torch in float32": errors(single, exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    cases = {name: partial(swept, name, options.images) for name in FAMILIES}
    record("sweep", {"n": options.images, "seed": SEED}, cases, ("torch", "torchvision", "onnxscript"))


if __name__ == "__main__":
    main()
