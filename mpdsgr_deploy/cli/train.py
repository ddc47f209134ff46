"""mpdsgr train"""

from pathlib import Path

import click

from mpdsgr_deploy.allocator import keep_pages
from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe

DEFAULT = "digits-robust"  # of the methods measured, what keeps most under all attacks; see train/results


@click.command("train")
@click.argument("recipe", default=DEFAULT)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a recipe field.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/RECIPE]")
@click.option("--resume", is_flag=True, help="Continue an interrupted run from its last finished epoch.")
@click.option("--init", metavar="ORIGIN", help="Start from the weights of a run, a bundle or package.module:function.")
@click.option("--profile", is_flag=True, help="Write where the time of the first steps went to OUT/profile.")
@json_option
def command(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    init: str | None,
    profile: bool,
    as_json: bool,
) -> None:
    """Train RECIPE: a built-in name (see `mpdsgr recipes`) or a .toml file; digits-robust without one.

    That is adversarial training with SR, which keeps most under all attacks of what was measured; the paper's own
    method is cifar10-vgg11-mpdsgr, or digits-mpdsgr. Writes checkpoints (last, best), TensorBoard curves and what
    --resume needs. `mpdsgr export` takes the last epoch; --checkpoint best takes the one that validated best.

    Several nodes train together with training.nodes: start this command by torchrun or srun, or once on each node with
    MASTER_ADDR, MASTER_PORT and NODE_RANK set. All of them need the data and a shared --out.

    --init takes a run, a checkpoint or a bundle of this package, or package.module:function, which returns a torch
    module whose layers map one to one onto the recipe's.

    \b
    Example:
      mpdsgr train
      mpdsgr train digits-mpdsgr --set training.epochs=5 --out runs/first
      torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m mpdsgr_deploy train
        cifar10-vgg11-mpdsgr --set training.nodes=2 --set training.devices=8 --out /shared/run --resume
    """
    path = find_recipe(recipe)
    resolved = load_recipe(path, overrides)
    out = out or Path("runs") / path.stem
    need("lightning_fabric", "train")
    from mpdsgr_deploy.checkpoint import load_checkpoint
    from mpdsgr_deploy.training import origin, train

    keep_pages()
    if not train(resolved, out, resume=resume, profile=profile, init=None if init is None else origin(init)):
        return
    last, best = load_checkpoint(out / "last"), load_checkpoint(out / "best")
    if as_json:
        score = {"epoch": best.epoch, "score_of": best.score_of, **best.metrics}
        print_json({"out": str(out), "epoch": last.epoch, **last.metrics, "best": score})
    else:
        for checkpoint in (last, best):
            accuracy = checkpoint.metrics["validation_accuracy"]
            click.echo(f"{checkpoint.origin}: validation accuracy {accuracy:.1%}")
        root = "" if resolved.data.root == resolved.portable().data.root else f" --root {resolved.data.root}"
        click.echo(f"next: mpdsgr export {out} --out {out}/bundle{root}")
