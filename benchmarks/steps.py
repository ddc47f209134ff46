"""What each number of time steps costs, on bundles: the table in export/README.md.

    python benchmarks/steps.py export/bundles/digits export/bundles/cifar10-clean --root data

The same as `mpdsgr inspect BUNDLE --steps`; the rows of bundles that are not named stay in the results file. Of a
bundle that was trained at fewer steps, from the weights of a longer run, `--tuned` shows its own number of steps only.
"""

from pathlib import Path
from typing import Any

import click
import harness

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.exporting.step_table import BATCHES, CONDITIONS, StepCost, step_costs, step_times
from mpdsgr_deploy.progress import show_progress
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.reference import IMAGES as CARRIED
from mpdsgr_deploy.validation.image_checks import chosen_images

IMAGES = 350
HEADER = (
    *("network", "precision", "steps", *(f"{name} %" for name in CONDITIONS), "clean lost, regained"),
    *("worst lost, regained", *(f"ms, batch {size}" for size in BATCHES), "MMACs"),
)
LEGEND = (
    "Shares of right test images; `worst` is under all attacks of tier `commit`, each network attacked anew. lost, "
    "regained: images that all steps get right and fewer do not, and the reverse. ms: per image, median of 15, "
    "onnxruntime's CPU provider, {threads} threads. MMACs: million multiply-accumulates per image."
)


@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--tuned", multiple=True, type=click.Path(path_type=Path), help="A bundle trained at fewer steps.")
@click.option("--root", help="Where CIFAR-10 lies.  [default: the recipe's]")
@click.option("--again", is_flag=True, help="Time the bundles once more, and leave what else is in the results file.")
@click.option("--limit", default=IMAGES, show_default=True, help="Test images.")
def run(
    bundles: tuple[Path, ...], tuned: tuple[Path, ...], root: str | None, again: bool, limit: int
) -> dict[str, Any]:
    """Attack and time each bundle at every number of steps."""
    show_progress()
    networks: dict[str, dict[str, Any]] = harness.load("steps")["networks"]
    for path in bundles + tuned:
        name = path.resolve().name
        networks[name] = retimed(path, networks[name], root) if again else measure(path, root, limit, path in tuned)
    return {"networks": dict(sorted(networks.items(), key=lambda entry: entry[1]["tuned"]))}


def measure(path: Path, root: str | None, limit: int, tuned: bool) -> dict[str, Any]:
    """One bundle's rows, with what it is and which images it met."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    images = images_of(bundle, limit, root)
    recipe = manifest.recipe
    return {
        "tuned": tuned,
        "digest": manifest.digest,
        "network": f"{recipe.model.name}, width {recipe.model.width:g}, {recipe.method}, {manifest.time_steps}",
        "images": name_sample(len(images), recipe.data.name),
        "eps": recipe.attack.eps,
        "seed": recipe.validation.seed,
        "provenance": provenance(),
        "rows": [as_record(row) for row in step_costs(bundle, images)],
    }


def retimed(path: Path, network: dict[str, Any], root: str | None) -> dict[str, Any]:
    """A network of the results file with new times of its bundle."""
    bundle = open_bundle(path)
    earlier = bundle.manifest.provenance.get("rewritten", {}).get("digest")  # before its attack graphs were left out
    assert network["digest"] in (bundle.manifest.digest, earlier), f"{path} is not what was attacked"
    times = step_times(bundle, images_of(bundle, network["rows"][0]["n"], root))
    rows = [
        row | {"milliseconds": {str(n): ms for n, ms in times[row["precision"]][row["steps"] - 1].items()}}
        for row in network["rows"]
    ]
    return network | {"rows": rows}


def images_of(bundle: Bundle, limit: int, root: str | None) -> Images:
    """The first images that the bundle carries, or that the data set has."""
    return chosen_images(bundle, None, limit, None, None if CARRIED in bundle.manifest.files else root)


def as_record(row: StepCost) -> dict[str, Any]:
    """A row as JSON holds it, whose keys are text."""
    flips = {name: flips._asdict() for name, flips in row.flips.items()}
    return row._asdict() | {"flips": flips, "milliseconds": {str(n): ms for n, ms in row.milliseconds.items()}}


def render(result: dict[str, Any]) -> str:
    """The table, and what the networks and images are."""
    lines = [
        (f"{name}, tuned" if network["tuned"] else name, *cells(row))
        for name, network in result["networks"].items()
        for row in network["rows"]
        if not network["tuned"] or row["steps"] == max(other["steps"] for other in network["rows"])
    ]
    notes = [
        f"- {name}: {network['network']}; {network['images']}, eps {network['eps'] * 255:.3g}/255, "
        f"seed {network['seed']}. {harness.source(network)}"
        for name, network in result["networks"].items()
    ]
    legend = LEGEND.format(threads=result["provenance"]["hardware"]["cores"])
    return harness.table(HEADER, lines, legend, "", *notes)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a results file as the table shows it."""
    percent = [f"{100 * row['correct'][name] / row['n']:.1f}" for name in CONDITIONS]
    flips = ["{lost}, {regained}".format(**row["flips"][name]) for name in ("clean", "worst")]
    times = [f"{row['milliseconds'][str(size)]:.3g}" for size in BATCHES]
    return [row["precision"], str(row["steps"]), *percent, *flips, *times, f"{row['macs'] / 1e6:.3g}"]


main = harness.command("steps", run, render)

if __name__ == "__main__":
    main()
