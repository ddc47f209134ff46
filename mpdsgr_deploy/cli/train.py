"""mpdsgr train"""

from pathlib import Path

import click

from mpdsgr_deploy.allocator import keep_pages
from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe

DEFAULT = "digits-robust"  # the most accurate under all attacks of the methods in train/results


@click.command("train")
@click.argument("recipe", default=DEFAULT)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a field of the recipe; may be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory for the run.  [default: runs/RECIPE]")
@click.option("--resume", is_flag=True, help="Continue an interrupted run from its last finished epoch.")
@click.option("--init", metavar="ORIGIN", help="Start from the weights of ORIGIN, as described above.")
@click.option(
    "--profile", is_flag=True, help="Also profile the first training steps with torch's profiler, into OUT/profile."
)
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
    """Train a network as RECIPE describes it.

    RECIPE is a built-in name (`mpdsgr recipes` lists them) or a .toml file. The default, digits-robust, combines
    adversarial training with the SR regulariser, the most accurate under attack of the methods measured. The paper's
    own method, MPD-SGR, is in the recipes cifar10-vgg11-mpdsgr and digits-mpdsgr.

    The run directory gets the checkpoints of the last and of the best epoch, TensorBoard curves, and the state that
    --resume needs. `mpdsgr export` takes the last epoch unless it is given --checkpoint best.

    To train on several nodes set training.nodes, and start this command by torchrun or srun, or once on each node with
    MASTER_ADDR, MASTER_PORT and NODE_RANK set. Every node needs the data set and the same shared --out.

    ORIGIN of --init is a run, a checkpoint or a bundle of this package, or package.module:function, where the function
    returns a torch module whose layers correspond one to one to those of the recipe's network.

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
