"""mpdsgr bundles"""

import shutil
from pathlib import Path

import click

from mpdsgr_deploy.bundle import Manifest, open_bundle
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.reference import IMAGES


@click.command("bundles")
@click.option("--copy", "name", metavar="NAME", help="Copy a bundle into the current directory.")
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the trained networks that come with the package, or copy one.

    They are bundles, ready for `mpdsgr validate`, `predict` and `serve`. The columns clean and worst are accuracies of
    the torch network on n test images: without an attack, and counting only images that are correct under every attack
    of the tier within eps. If a bundle contains no test images, give `mpdsgr validate` the directory of the data set
    with --root.

    \b
    Example:
      mpdsgr bundles --copy digits
      mpdsgr validate digits --report reports/digits
    """
    bundles = {path.name: path for path in sorted(shipped("export").glob("bundles/*/"))}
    if name is not None:
        source, target = choose("bundle", bundles, name), Path(name)
        if target.exists():
            raise InputError(f"{target} already exists in this directory; rename or remove it first")
        manifest = open_bundle(source).manifest  # verifies the hashes of all files
        shutil.copytree(source, target)
        if as_json:
            print_json({"copied": str(target)})
        else:
            root = "" if IMAGES in manifest.files else f" --root DIR (where {manifest.recipe.data.name} lies)"
            click.echo(f"copied to {target}; next: mpdsgr validate {target} --report {target}-report{root}")
        return
    manifests = {name: open_bundle(path).manifest for name, path in bundles.items()}
    if as_json:
        print_json({name: manifest.model_dump(mode="json") for name, manifest in manifests.items()})
    else:
        columns = ("bundle", "network", "trained with", "precisions", "images", "tier", "n", "clean %", "worst %")
        print_table(columns, [(name, *described(manifest)) for name, manifest in manifests.items()])


def described(manifest: Manifest) -> tuple[str, ...]:
    """Return the cells of a bundle's row, after its name; empty ones if it has no reference."""
    recipe, promise = manifest.recipe, manifest.reference
    network = f"{recipe.model.name} for {recipe.data.name}, {manifest.time_steps}"
    carried = "yes" if IMAGES in manifest.files else "no"
    cells = (network, recipe.method, ", ".join(manifest.variants), carried)
    if promise is None:
        return (*cells, "", "", "", "")
    accuracies = (f"{100 * promise.correct[name] / promise.n:.1f}" for name in ("clean", "worst"))
    return (*cells, promise.tier, str(promise.n), *accuracies)
