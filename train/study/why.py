"""Why a method helps or not: what perturbations of growing size promise and do, and what the gradient is made of.

python train/study/why.py digits base at        networks of study.py, trained where they are not; WHY.md and its plot
"""

import sys
from pathlib import Path

import click

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))

import variants  # noqa: E402, F401
from explain import Why, explain  # noqa: E402
from measure import trained  # noqa: E402
from reproduce import RESULTS  # noqa: E402
from study_table import load_study  # noqa: E402

from mpdsgr_deploy.cli import OneLineErrors  # noqa: E402
from mpdsgr_deploy.data import load_test  # noqa: E402
from mpdsgr_deploy.files import write_atomic  # noqa: E402
from mpdsgr_deploy.networks import load_network  # noqa: E402
from mpdsgr_deploy.progress import log, show_progress  # noqa: E402
from mpdsgr_deploy.provenance import provenance  # noqa: E402


@click.command(cls=OneLineErrors)
@click.argument("study")
@click.argument("rows", nargs=-1, required=True)
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Training runs.")
@click.option("--root", default="data", show_default=True, help="Where the data set lies.")
@click.option("--images", type=click.IntRange(1), default=200, show_default=True, help="The first so many test images.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Results.  [default: train/results]")
def main(study: str, rows: tuple[str, ...], runs: Path, root: str, images: int, out: Path) -> None:
    """Explain the networks of ROWS (settings or SETTING.METHOD) of STUDY."""
    from why_page import write_why

    show_progress()
    name, found = load_study(study)
    table, networks = found.table(), []
    for row in found.chosen(rows):
        for seed in found.seeds:
            recipe = table.recipe(row, seed)
            log.info("%s, seed %d", row.title, seed)
            _, model = load_network(trained(name, row.title, recipe, runs=runs, root=root) / "last")
            networks.append(explain(row.title, model, load_test(recipe.data.at(root))[:images], recipe))
    rule = f"the first {images} test images of {recipe.data.name}"
    why = Why(images=rule, networks=networks, provenance=provenance())
    (out / name).mkdir(parents=True, exist_ok=True)
    write_atomic(out / name / "why.json", (why.model_dump_json(indent=1) + "\n").encode())
    click.echo(f"page in {write_why(found, out / name)}")


if __name__ == "__main__":
    main()
