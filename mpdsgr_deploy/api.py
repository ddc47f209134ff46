"""The public functions of `import mpdsgr_deploy as mpd`: train, export, adopt, validate, predict.

They take names and paths as the commands do, and return what the next step needs. Errors that a user can act on are
`mpdsgr_deploy.errors.MpdsgrError`. Everything else in the package may change without notice.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.bundle import open_bundle as _open_bundle
from mpdsgr_deploy.data.images import Images, to_unit
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import find_recipe
from mpdsgr_deploy.runtime.image_batches import predict as _predict_batches
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND, open_predictor
from mpdsgr_deploy.signing.trust import required_trust
from mpdsgr_deploy.stores import place_of

if TYPE_CHECKING:
    from mpdsgr_deploy.validation.evidence import Rebuild
    from mpdsgr_deploy.validation.report import Report

__all__ = ["adopt", "export", "export_module", "open_bundle", "open_predictor", "predict", "train", "validate"]

AnyPath = str | PathLike[str]


def train(
    recipe: Recipe | AnyPath,
    out: AnyPath,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    profile: bool = False,
    init: AnyPath | None = None,
) -> Path:
    """Train a recipe (a built-in name, a .toml file or a `Recipe`) into directory `out`, and return that directory.

    overrides: texts such as "training.epochs=5" that replace fields of a recipe file.
    resume: continue an interrupted run, or start one.
    profile: write a profile of the first steps, with time and memory by layer, to out/profile.
    init: a run or bundle whose weights training starts from (fine-tuning), or package.module:function, which returns a
        torch module.

    Raises InputError for an invalid recipe, missing data, a missing extra `train`, and an `out` that holds other files
    or, without `resume`, a run.
    """
    need("lightning_fabric", "train")
    from mpdsgr_deploy.training import origin
    from mpdsgr_deploy.training import train as run

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(find_recipe(str(recipe)), overrides)
    elif overrides:
        raise InputError("overrides work only with recipe files and names; change a Recipe object with model_copy")
    run(recipe, Path(out), resume=resume, profile=profile, init=None if init is None else origin(init))
    return Path(out)


def export(
    checkpoint: AnyPath,
    out: AnyPath,
    *,
    precisions: Sequence[str] = (),
    max_drop: float | None = None,
    tier: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    carry_images: bool = True,
    steps: int | Literal["auto"] | None = None,
) -> Bundle:
    """Write the bundle of a training run or checkpoint to directory `out`, and open it.

    precisions: those to add to "fp32".
    max_drop: the largest loss of accuracy that each of these may have against fp32, in [0, 1].
    tier: how hard the torch network is attacked for the reference ("commit", "release", "paper").
    root: the directory of the data set. limit: number of test images, the same ones in every call.
    carry_images: put the test images into the bundle.
    steps: export only this number of time steps, the first ones; "auto": the fewest that lose less than max_drop on
        validation images.

    Raises InputError for a damaged checkpoint or an `out` that holds other files, EvaluationError if the exported
    network differs from the torch model or max_drop cannot be met.
    """
    need("onnxscript", "train")
    from mpdsgr_deploy.exporting import export as write

    return write(
        Path(checkpoint),
        Path(out),
        precisions=precisions,
        max_drop=max_drop,
        tier=tier,
        root=root,
        limit=limit,
        carry_images=carry_images,
        steps=steps,
    )


def export_module(
    module: Any,
    images: str | Images,
    out: AnyPath,
    *,
    surrogate: str = "triangle",
    precisions: Sequence[str] = (),
    tier: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    **details: Any,
) -> Bundle:
    """Write the bundle of any torch module that maps images to logits to directory `out`, and open it.

    images: labelled images, the name of a data set, or an .npz file, on which the reference is measured.
    surrogate: replaces the derivative of spikes under attack, "KIND" or "KIND:WIDTH".
    precisions, tier, root, limit: see `export`. Further arguments are those of `mpdsgr_deploy.exporting.export_module`.

    Raises InputError for a module that cannot be exported or attacked, EvaluationError if its ONNX file gives other
    logits, or if the module keeps a state from one call to the next.
    """
    need("onnxscript", "train")
    from mpdsgr_deploy.exporting import export_module as write

    labelled = _labelled(images, root, limit)
    return write(module, labelled, Path(out), surrogate=surrogate, precisions=precisions, tier=tier, **details)


def adopt(
    model: AnyPath,
    images: str | Images,
    out: AnyPath,
    *,
    surrogate: str = "triangle",
    tier: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    **details: Any,
) -> Bundle:
    """Write the bundle of any ONNX classifier, whose nodes are kept, to directory `out`, and open it.

    images, surrogate, tier, root, limit: see `export_module`. Further arguments are those of
    `mpdsgr_deploy.adoption.adopt`. Raises InputError for a network that the images do not fit or that cannot be
    attacked.
    """
    from mpdsgr_deploy.adoption import adopt as write

    labelled = _labelled(images, root, limit)
    return write(Path(model), labelled, Path(out), surrogate=surrogate, tier=tier, **details)


def _labelled(images: str | Images, root: str | None, limit: int | None) -> Images:
    """Return at most `limit` labelled images. Raises InputError for a `root` of images that are not a data set's."""
    from mpdsgr_deploy.adoption.evaluation_images import evaluation_images

    if isinstance(images, str):
        return evaluation_images(images, root, None, limit)
    if root is not None:
        raise InputError("root is the directory of a named data set, and these are images; leave root out")
    return images[:limit] if limit else images


def open_bundle(path: AnyPath, *, require_signature: str | None = None) -> Bundle:
    """Read and verify a bundle directory.

    require_signature: who must have signed it: a file with a public key or certificates, or "IDENTITY,ISSUER" of
    Sigstore. The bundle is then read from a private copy of the signed files.

    Raises InputError if the directory is not a bundle, is damaged or incomplete, or lacks the required signature.
    """
    return _open_bundle(Path(path), required_trust(require_signature))


def validate(
    bundle: Bundle | AnyPath,
    report_dir: AnyPath,
    *,
    backend: str = DEFAULT_BACKEND,
    precision: str = "fp32",
    tier: str | None = None,
    gate: AnyPath | None = None,
    limit: int | None = None,
    root: str | None = None,
    rebuild: bool | None = None,
) -> "Report":
    """Attack the exported network, decide by the gate, and write the report into `report_dir`.

    Return the report, whose `verdict` is "pass", "fail" or "invalid".

    tier: how many images are attacked, and how hard ("commit", "release", "paper"); default: the gate's, or the
        bundle's.
    gate: a TOML file of rules, whose `require_signature` is obeyed too; default: the bundle's rules.
    limit: number of test images, the same ones in every call.
    root: the directory of the data set, whose images replace those in the bundle.
    rebuild: export again from the bundle's weights and compare the files; None does so if torch is installed.

    Raises InputError for missing data, an unusable backend, or too few images for the gate, EvaluationError if the
    backend computes wrong logits for the golden inputs.
    """
    from mpdsgr_deploy.validation import Target
    from mpdsgr_deploy.validation import validate as evaluate
    from mpdsgr_deploy.validation.gate import load_gate, signature_of_gate
    from mpdsgr_deploy.validation.writing import report_directory, write_report

    rules, signature = (None, None) if gate is None else (load_gate(Path(gate)), signature_of_gate(Path(gate)))
    if signature is not None or not isinstance(bundle, Bundle):
        place = bundle.path if isinstance(bundle, Bundle) else bundle
        bundle = open_bundle(place, require_signature=signature)
    directory, again = Path(report_dir), rebuilding(rebuild)
    with report_directory(directory):
        target = Target(bundle, backend, precision)
        report = evaluate(target, gate=rules, tier=tier, limit=limit, root=root, report_dir=directory, rebuild=again)
        write_report(report, directory)
    return report


def rebuilding(asked: bool | None) -> "Rebuild | None":
    """Return the function that exports again; None if `asked` is False, or if it is None and torch is missing.

    Raises InputError if `asked` is True and torch is missing.
    """
    if asked is False or (asked is None and find_spec("torch") is None):
        return None
    need("torch", "train")
    from mpdsgr_deploy.exporting.rebuild import check_rebuilt

    return check_rebuilt


def predict(
    bundle: Bundle | AnyPath,
    images: NDArray[Any] | AnyPath | Sequence[AnyPath],
    *,
    backend: str = DEFAULT_BACKEND,
    precision: str = "fp32",
    batch: int = 128,
) -> NDArray[np.float32]:
    """Return the logits [N, K] of images.

    images: an array [N, C, H, W] (uint8, or float32 in [0, 1]), or paths and addresses as `mpdsgr predict` takes them.
    batch: images per batch.

    Raises InputError for images that do not fit the network, EvaluationError if the backend computes wrong logits for
    the golden inputs.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if isinstance(images, np.ndarray):
        with open_predictor(opened, backend, precision) as predictor:
            return _predict_batches(predictor, to_unit(images), batch)
    from mpdsgr_deploy.prediction import Job

    paths = [images] if isinstance(images, str | PathLike) else images
    return Job(opened, [place_of(fspath(path)) for path in paths], backend, precision, batch).logits()
