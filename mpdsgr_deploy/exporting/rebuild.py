"""Export again and compare: are a bundle's networks what its own weights and its own recipe give?

Whoever trusts the weights (or has signed them) then need not trust the ONNX files: a branch that was added, a file of
another training, weights that were changed, an operator of another library all make other bytes. Needs torch.
"""

import tempfile
from pathlib import Path

from mpdsgr_deploy.attack_graph import derived
from mpdsgr_deploy.bundle import WEIGHTS, Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import convert, plan
from mpdsgr_deploy.files import writing
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.networks import load_model
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.surrogates import trained_surrogate

WRITERS = ("torch", "onnx", "onnxscript")  # packages whose versions decide which bytes are written


def rebuild_faults(bundle: Bundle) -> list[str]:
    """One line per file that differs from what the weights give; none if all are the same, byte for byte.

    Raises InputError if the weights are not those of the recipe's network.
    """
    manifest, faults = bundle.manifest, []
    model = load_model(bundle.file(WEIGHTS), manifest.recipe, manifest.input_shape, len(manifest.labels)).eval()
    graph = to_graph(simplify(model), manifest.input_shape)
    surrogate = trained_surrogate(manifest.recipe)
    with tempfile.TemporaryDirectory() as folder:
        for precision, variant in manifest.variants.items():
            again = Path(folder) / f"model.{precision}.onnx"
            missing = plan(graph, precision).keys() ^ variant.layers.keys()
            if missing:
                faults.append(f"{variant.file}: the manifest and the weights differ in the layers {sorted(missing)}")
                continue
            with writing(again, "what was finished is kept"):
                save(convert(graph, variant.layers), again)
            if again.read_bytes() != bundle.variant(precision).read_bytes():
                faults.append(f"{variant.file} is not what the weights and the recipe give")
            if variant.attack and derived(again, surrogate) != bundle.attack(precision).read_bytes():
                faults.append(f"{variant.attack} is not what the weights and the recipe give")
    return faults


def other_writers(bundle: Bundle) -> list[str]:
    """The packages that wrote the bundle in another version than those here, whose bytes may then differ."""
    mine, theirs = (made.get("packages", {}) for made in (provenance(), bundle.manifest.provenance.get("export", {})))
    versions = ((name, theirs.get(name), mine.get(name)) for name in WRITERS)
    return [f"{name} {there} there, {here} here" for name, there, here in versions if there != here]


def check_rebuilt(bundle: Bundle) -> list[str]:
    """The result of `rebuild_faults`.

    Raises InputError for a bundle without weights, and where both files and the packages that write them differ.
    """
    if bundle.manifest.origin != "trained":
        raise InputError(f"{bundle.path} holds no weights to export again: its network is {bundle.manifest.origin}")
    faults = rebuild_faults(bundle)
    if faults and (others := other_writers(bundle)):
        raise InputError(
            f"{'; '.join(faults)}, but other versions wrote it ({'; '.join(others)}): compare with those installed"
        )
    return faults
