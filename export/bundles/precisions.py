"""Does a shipped bundle answer in every precision as in float32? On all test images, and attacked on some of them.

    python export/bundles/precisions.py export/bundles/cifar10-clean --root data --attacked 500

Each precision is attacked through its own attack graph, by PGD in the paper's setting within eps and within a quarter
of it. Verdicts are compared image by image; the counts go into precisions.json beside this file.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, PGD, Source
from mpdsgr_deploy.attacks.measure import measure
from mpdsgr_deploy.attacks.run import classes_of
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.attacks.tiers import entry
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.data.sampling import name_sample
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.progress import show_progress
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.validation import Target
from mpdsgr_deploy.validation.proportions import mcnemar

FILE = Path(__file__).with_suffix(".json")
Verdicts = dict[str, NDArray[np.bool_]]  # by condition, [n]


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--root", help="Where the data set lies.  [default: the recipe's]")
@click.option("--attacked", default=500, show_default=True, help="Test images that are attacked.")
def main(path: Path, root: str | None, attacked: int) -> None:
    """Compare the precisions of the bundle PATH and keep the counts."""
    show_progress()
    bundle = open_bundle(path)
    images = load_test(bundle.manifest.recipe.data.at(root))
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    results[path.name] = compared(bundle, images, attacked)
    write_atomic(FILE, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())


def compared(bundle: Bundle, images: Images, attacked: int) -> dict[str, Any]:
    """What every precision gets right under each condition, and the images on which it differs from fp32."""
    verdicts = {precision: answered(bundle, precision, images, attacked) for precision in bundle.manifest.variants}
    data = bundle.manifest.recipe.data.name
    return {
        "weights_sha256": bundle.manifest.files["weights.safetensors"],
        "clean": name_sample(len(images), data),
        "attacked": name_sample(attacked, data),
        "precisions": {
            precision: {name: counts(right, verdicts["fp32"][name]) for name, right in own.items()}
            for precision, own in verdicts.items()
        },
        "provenance": provenance(),
    }


def answered(bundle: Bundle, precision: str, images: Images, attacked: int) -> Verdicts:
    """Which images one precision gets right: all of them clean, the first `attacked` under PGD."""
    attack, seed = bundle.manifest.recipe.attack, bundle.manifest.recipe.validation.seed
    size, target = bundle.manifest.recipe.validation.batch_size, Target(bundle, precision=precision)
    quarter = entry("pgd", f"{PGD} eps/4", eps=attack.eps / 4, step=attack.step / 4)
    with target.open() as artefact:
        predicted = classes_of(predict(artefact, images.unit(), size, f"{precision}, {CLEAN}"))
        suite = Suite.of(Source(artefact, target.trained), (entry("pgd", PGD), quarter), attack, seed=seed)
        few = images[:attacked]
        measured = measure(suite, few.unit(), few.classes, predicted[:attacked], batch_size=size, of=f"{precision}, ")
    outcomes = {outcome.condition.name: outcome.correct for outcome in measured.outcomes}
    return {CLEAN: predicted == images.classes, **outcomes}


def counts(right: NDArray[np.bool_], exact: NDArray[np.bool_]) -> dict[str, Any]:
    """Of n images: those right, and those newly wrong and newly right against float32, with McNemar's p."""
    worse, better = int((exact & ~right).sum()), int((right & ~exact).sum())
    return {
        "n": len(right),
        "right": int(right.sum()),
        "newly_wrong": worse,
        "newly_right": better,
        "p": mcnemar(worse, better),
    }


if __name__ == "__main__":
    main()
