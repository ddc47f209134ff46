"""Damage copies of a bundle, so that the demo and the tests can show that damage is detected."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.bundle import GOLDEN, MANIFEST, Bundle, Manifest
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime

READOUT = "readout.weight"


def damage(bundle: Bundle, out: Path) -> Path:
    """Copy `bundle` to directory `out`, with Gaussian noise added to the last layer's weights in the float32 network.

    The noise has the standard deviation of the weights. Nothing else is changed, so `open_bundle` refuses the copy.
    Returns `out`.
    """
    shutil.copytree(bundle.path, out)
    file = out / bundle.manifest.variants["fp32"].file
    network = onnx.load(file)
    (readout,) = (tensor for tensor in network.graph.initializer if tensor.name == READOUT)
    weights = numpy_helper.to_array(readout)
    added_noise = np.random.default_rng(0).normal(0, weights.std(), weights.shape)
    readout.CopyFrom(numpy_helper.from_array((weights + added_noise).astype(weights.dtype), READOUT))
    onnx.save(network, file)
    return out


def cover_up(damaged: Path, bundle: Bundle) -> Path:
    """Adapt the golden logits and the hashes of a damaged copy of `bundle` to its damaged float32 network.

    `open_bundle` and the golden check then accept the copy, as they accept a bundle that was forged. Returns `damaged`.
    """
    variant = bundle.manifest.variants["fp32"]
    with np.load(damaged / GOLDEN) as arrays:
        golden = dict(arrays)
    noise = NoiseSource(bundle.manifest.noise, bundle.manifest.recipe.validation.seed)
    with OnnxRuntime(damaged / variant.file, noise=noise) as network:
        golden["fp32"] = network(golden["inputs"])
    np.savez(damaged / GOLDEN, **golden)
    return seal_again(damaged)


def seal_again(bundle: Path) -> Path:
    """Write the hashes of a bundle's current files, and the new digest, into its manifest; return its directory."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"] = {name: sha256(bundle / name) for name in manifest["files"]}
    manifest["digest"] = Manifest.model_validate(manifest).computed_digest()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return bundle
