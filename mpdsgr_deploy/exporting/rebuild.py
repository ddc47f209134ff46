"""Check that a bundle's ONNX files follow from its own weights and recipe, by exporting them again. Needs torch.

A user who trusts the weights (or has signed them) then need not trust the ONNX files: an added branch, a file of
another training, changed weights or an operator of another library all give different bytes.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpdsgr_deploy.atomic_files import writing
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.bundle import Bundle, model_file
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import convert, plan
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.parity import MINIMUM_SHARE, compare
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.trained_networks import load_bundled

ALIKE = 1e-2  # the change that another order of rounding may cause, as a share of the gradient's largest entry
WRITERS = ("torch", "onnx", "onnxscript")  # packages whose versions decide which bytes are written


def rebuild_faults(bundle: Bundle) -> list[str]:
    """Return one line per file that differs from a new export of the weights; an empty list if none does in any byte.

    Raises InputError as `load_bundled` does.
    """
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for precision, rebuilt, layers in _exported_again(bundle, Path(folder)):
            variant = bundle.manifest.variants[precision]
            if layers:
                faults.append(f"{variant.file}: the manifest and the weights differ in the layers {layers}")
                continue
            if rebuilt.read_bytes() != bundle.variant(precision).read_bytes():
                faults.append(f"{variant.file} differs from an export of the weights and the recipe")
    return faults


def _exported_again(bundle: Bundle, folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Export every precision from the weights to `folder`; yield the precision, its file, and the layers that differ.

    Those are the names of layers that only the manifest or only the network has; if there are any, no file is written.
    """
    model = load_bundled(bundle, otherwise="its ONNX files cannot be exported again")
    graph = to_graph(simplify(model), bundle.manifest.input_shape)
    for precision, variant in bundle.manifest.variants.items():
        rebuilt = folder / model_file(precision)
        layers = sorted(plan(graph, precision).keys() ^ variant.layers.keys())
        if not layers:
            with writing(rebuilt, "finished results are kept"):
                save(convert(graph, variant.layers), rebuilt)
        yield precision, rebuilt, layers


def different_gradients(bundle: Bundle) -> list[str]:
    """Return one line per precision whose logits or gradients on the golden batch differ from those of a new export.

    Other versions of the exporting packages write other bytes for the same function; this compares the functions. It
    detects a branch that changes the gradient but no logits, but not one that these images do not trigger. Precisions
    whose layers differ, which `rebuild_faults` reports, are left out.
    """
    manifest, faults = bundle.manifest, []
    surrogate, seed = trained_surrogate(manifest.recipe), manifest.recipe.validation.seed
    with tempfile.TemporaryDirectory() as folder:
        for precision, rebuilt, layers in _exported_again(bundle, Path(folder)):
            if layers:
                continue
            inputs, logits = bundle.golden(precision)
            gradients = []
            for file in (rebuilt, bundle.variant(precision)):
                with GraphAttacker(file, surrogate, noise=manifest.noise, seed=seed) as attacker:
                    gradients.append(attacker(inputs, logits.argmax(1)))
            expected, actual = gradients
            scale = np.abs(expected.gradient).max((1, 2, 3), initial=np.finfo(np.float32).tiny)
            alike = np.abs(actual.gradient - expected.gradient).max((1, 2, 3)) <= ALIKE * scale
            parity = compare(expected.logits, actual.logits)
            if not parity.holds or alike.mean() < MINIMUM_SHARE:
                faults.append(
                    f"{manifest.variants[precision].file} has the gradients of the weights on {alike.sum()} of "
                    f"{len(alike)} images: {parity}"
                )
    return faults


def other_writers(bundle: Bundle) -> list[str]:
    """Return one line per package of WRITERS whose version here differs from the one that wrote the bundle."""
    mine, theirs = (made.get("packages", {}) for made in (provenance(), bundle.manifest.provenance.get("export", {})))
    versions = ((name, theirs.get(name), mine.get(name)) for name in WRITERS)
    return [f"{name} {there} there, {here} here" for name, there, here in versions if there != here]


def check_rebuilt(bundle: Bundle) -> list[str]:
    """Return the faults of a bundle's ONNX files; an empty list if they follow from its weights.

    The faults are those of `rebuild_faults` or, if other versions of the packages wrote the files, those of
    `different_gradients`. Raises InputError for a bundle without weights, and if other versions wrote files that differ
    in their bytes but not in their gradients, so that the question stays open.
    """
    faults = rebuild_faults(bundle)
    if faults and (others := other_writers(bundle)):
        if different := different_gradients(bundle):
            return different
        raise InputError(
            f"{'; '.join(faults)}, but other versions wrote it ({'; '.join(others)}), and answers and gradients "
            "on the golden batch equal those of the weights; install those versions to compare the files"
        )
    return faults
