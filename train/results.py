"""Results files: what a training run and its validation report measured, in one JSON each, and their table.

    python train/results.py add RUN BUNDLE REPORT --root DATA    writes train/results/NAME.json, NAME being the run's
    python train/results.py table                                renders the tables of train/results/README.md

Nothing is typed in by hand: a row exists because a run wrote its file.
"""

import json
from pathlib import Path
from typing import Any

import click
from sensitivity import measure

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.validation.report import Report, percent

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "README.md"
BEGIN, END = "<!-- table: python train/results.py table -->\n", "<!-- end of table -->\n"
SHOWN = ("clean", "gaussian", "fgsm", "pgd", "bim", "pgd-strong", "worst")


@click.group()
def main() -> None:
    """Collect and render results."""


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option("--root", default="data", show_default=True, help="Where the data set lies.")
@click.option("--images", default=500, show_default=True, help="Test images for the sensitivity measurement.")
def add(run: Path, bundle: Path, report: Path, root: str, images: int) -> None:
    """Write the results file of RUN (a training run), its BUNDLE and that bundle's REPORT."""
    checkpoint = load_checkpoint(find_checkpoint(run))
    last = load_checkpoint(run / "last")
    verdict = json.loads((report / "report.json").read_bytes())
    if verdict["verdict"] == "invalid":
        raise InputError(f"{report} is not a valid evaluation; its figures must not be quoted")
    opened = open_bundle(bundle)
    data = load_test(opened.manifest.recipe.data.model_copy(update={"root": root}))[:images]
    result = {
        "recipe": checkpoint.recipe.portable().model_dump(mode="json"),
        "epoch": checkpoint.epoch,
        "validation": checkpoint.metrics,
        "layers": checkpoint.history[-1]["layers"],
        "curve": [{k: v for k, v in entry.items() if k != "layers"} for entry in last.history],
        "training_provenance": checkpoint.provenance,
        "sensitivity": measure(opened, data),
        "report": verdict,
    }
    path = RESULTS / f"{run.name}.json"
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    click.echo(f"wrote {path}")


@main.command()
def table() -> None:
    """Put the table of all results files into the results page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomic(PAGE, f"{before}{BEGIN}{render(load())}{END}{after}".encode())


def load() -> dict[str, dict[str, Any]]:
    """Every results file by name."""
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(RESULTS.glob("*.json"))}


def render(results: dict[str, dict[str, Any]]) -> str:
    """The results as two Markdown tables."""
    return accuracies(results) + "\n" + sensitivities(results)


def accuracies(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy of the exported network in % with its 95 % interval, Omega and firing rate."""
    lines = [
        f"| run | n | {' | '.join(SHOWN)} | Omega | firing rate, first / last layer |",
        "|---" * (len(SHOWN) + 4) + "|",
    ]
    for name, result in results.items():
        rows = {row.name: row for row in Report.model_validate(result["report"]).rows}
        cells = [percent(rows[shown].artefact) for shown in SHOWN]
        layers = result["layers"]
        omega = sum(layer["omega_empirical"] for layer in layers) / len(layers)
        firing = f"{layers[0]['firing_rate']:.3f} / {layers[-1]['firing_rate']:.3f}"
        lines.append(f"| {name} | {rows['clean'].n} | {' | '.join(cells)} | {omega:.3f} | {firing} |")
    return "\n".join(lines) + "\n"


def sensitivities(results: dict[str, dict[str, Any]]) -> str:
    """What perturbations do, in units of the network's own margin; see train/sensitivity.py."""
    lines = [
        "| run | n | margin | promised / margin | noise / margin | pgd / margin | flipped by pgd, first / last layer |",
        "|---" * 7 + "|",
    ]
    for name, result in results.items():
        found = result["sensitivity"]
        drops = [f"{found[kind] / found['margin']:.2f}" for kind in ("promised", "noise", "pgd")]
        flipped = list(found["flipped_pgd"].values())
        cells = [name, str(found["n"]), f"{found['margin']:.2f}", *drops, f"{flipped[0]:.3f} / {flipped[-1]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
