"""Exports the bundles that come with the package again, from their own weights: after a change of format or attacks.

    python export/bundles/rebuild.py --root data            all of them; `data` holds CIFAR-10
    python export/bundles/rebuild.py export/bundles/digits

Weights stay as they are, byte for byte, and the networks compute the same; what is measured again is the reference, on
as many images as before and with the attacks of the same tier.
"""

import filecmp
import tempfile
from pathlib import Path

import click
from safetensors.torch import load_file

from mpdsgr_deploy.bundle import WEIGHTS, Bundle, open_bundle
from mpdsgr_deploy.checkpoint import Checkpoint, save_checkpoint
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.progress import show_progress
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import find_recipe
from mpdsgr_deploy.reference import IMAGES

HERE = Path(__file__).resolve().parent
DOCTOR = HERE.parent / "doctor" / "bundle"
BUNDLES = (HERE / "digits", HERE / "cifar10", HERE / "cifar10-clean", DOCTOR)
GATES = {"digits": "digits-robust"}  # recipes whose gate the bundle takes over


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--root", help="Where CIFAR-10 lies.  [default: the recipe's]")
def main(bundles: tuple[Path, ...], root: str | None) -> None:
    """Export BUNDLES again in place."""
    show_progress()
    for path in map(Path.resolve, bundles or BUNDLES):
        worst = rebuild(open_bundle(path), root)
        click.echo(f"{path}: {worst}")


def rebuild(bundle: Bundle, root: str | None) -> str:
    """Replace a bundle by a new export of its weights; what survives all attacks, before and after.

    Raises InputError and EvaluationError as `export` does.
    """
    manifest, path = bundle.manifest, bundle.path
    before = manifest.reference
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(
            recipe=current(manifest.recipe, path.name),
            shape=manifest.input_shape,
            labels=manifest.labels,
            epoch=manifest.provenance["epoch"],
            choice="last",
            metrics={},
            history=[],
            provenance=manifest.provenance["training"],
        )
        source = Path(folder) / "last"
        save_checkpoint(source, checkpoint, load_file(path / WEIGHTS))
        out = Path(folder) / path.name
        export(
            source,
            out,
            precisions=[name for name in manifest.variants if name != "fp32"],
            root=root,
            tier=before.tier if before else None,
            carry_images=(path / IMAGES).exists(),
            limit=before.n if before else None,
        )
        assert filecmp.cmp(path / WEIGHTS, out / WEIGHTS, shallow=False), "export changed the weights"
        for file in out.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    after = open_bundle(path).manifest.reference
    counts = [f"{one.correct['worst']} of {one.n} ({one.tier})" if one else "no reference" for one in (before, after)]
    return " -> ".join(counts)


def current(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the gate that the package has for this bundle today."""
    if name not in GATES:
        return recipe
    return recipe.model_copy(update={"gate": load_recipe(find_recipe(GATES[name])).gate})


if __name__ == "__main__":
    main()
