"""mpdsgr export"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.checkpoint import CHOICES, Choice
from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need

if TYPE_CHECKING:
    from mpdsgr_deploy.bundle import Bundle


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory to write.")
@click.option(
    "--checkpoint",
    "choice",
    type=click.Choice(CHOICES),
    help="Which epoch of RUN: the last, or the best by its validation score.  [default: last]",
)
@click.option("--precision", default="", metavar="P,...", help="Besides fp32: fp16, int8, fp8, comma-separated.")
@click.option("--steps", metavar="N|auto", help="Export the first N time steps, or the fewest within --max-drop.")
@click.option(
    "--max-drop", type=click.FloatRange(0, 1), help="Largest loss of each precision and of --steps, clean and attacked."
)
@click.option("--root", help="Where the data set lies, for accuracy and golden inputs.  [default: the recipe's]")
@click.option("--limit", type=click.IntRange(1), help="Measure accuracy on N test images only, the same in every call.")
@click.option("--tier", help=f"How hard the reference is attacked: {', '.join(TIERS)}.  [default: the recipe's gate's]")
@click.option("--data", help="Of a module: a data set's name, a folder of CLASS/NAME.png, or an .npz file.")
@click.option("--surrogate", default="triangle:1", show_default=True, help="Of a module: what stands for its spikes.")
@click.option("--images/--no-images", default=True, show_default=True, help="Carry the test images in the bundle.")
@json_option
def command(
    run: Path,
    out: Path,
    choice: Choice | None,
    precision: str,
    steps: str | None,
    max_drop: float | None,
    root: str | None,
    limit: int | None,
    tier: str | None,
    data: str | None,
    surrogate: str,
    images: bool,
    as_json: bool,
) -> None:
    """Turn RUN (a training run, one of its checkpoints, or package.module:function) into a deployment bundle.

    The ONNX file is compared with the torch model before anything is written. Other precisions also meet attacked
    images. The torch network is attacked as `mpdsgr validate` will attack the artefact, and its verdicts go into the
    bundle as the reference, with the test images, so that a machine without torch and data set can validate it (leave
    them out with --no-images where their licence asks for it). --tier release takes 1,000 images and stronger attacks.

    With --max-drop 0.005 none may lose more than half a point of accuracy: layers go back to fp16 (those of
    fp16 to fp32), the worst first, until that holds.

    --steps N exports the network that answers after the first N time steps, of which everything in the bundle is then
    measured. --steps auto takes the fewest that, on validation images, rule out a drop of --max-drop (default: that of
    the tier) with 95 % confidence, clean and attacked; `mpdsgr inspect BUNDLE --steps` shows what each number costs.

    package.module:function returns any torch module that maps images to logits; --data says with which images it is
    attacked. Its ONNX file has to answer as it does.

    \b
    Example:
      mpdsgr export runs/digits-mpdsgr --out bundles/digits --precision fp16,int8
      mpdsgr export runs/vgg11 --out bundles/vgg11 --precision int8 --tier release --root data
    """
    need("onnxscript", "train")
    from mpdsgr_deploy.exporting import export

    precisions = [name.strip() for name in precision.split(",") if name.strip()]
    if ":" in run.name and not run.exists():
        if data is None or choice is not None or max_drop is not None or steps is not None:
            raise InputError(f"{run} is a module: give --data, and none of --checkpoint, --max-drop and --steps")
        bundle = _of_module(str(run), out, data, root, limit, surrogate, precisions, tier, images)
    else:
        bundle = export(
            run,
            out,
            choice=choice,
            steps=None if steps is None else _steps(steps),
            precisions=precisions,
            max_drop=max_drop,
            root=root,
            limit=limit,
            tier=tier,
            carry_images=images,
        )
    variants = bundle.manifest.variants
    if as_json:
        origin = bundle.manifest.provenance["checkpoint"]
        variants_json = {name: variant.model_dump() for name, variant in variants.items()}
        T, trained = bundle.manifest.recipe.encoding.T, bundle.manifest.trained_steps
        steps_json = {"exported": T, "trained": trained or T, **bundle.manifest.provenance.get("steps", {})}
        print_json({"bundle": str(out), "checkpoint": origin, "steps": steps_json, "variants": variants_json})
        return
    click.echo(f"exported the {bundle.manifest.provenance['checkpoint']}, {bundle.manifest.time_steps}")
    for name, variant in variants.items():
        measured = [(variant.accuracy, "test images correct"), (variant.attacked, "correct under attack (PGD)")]
        figures = [f"{a.correct} of {a.n} {a.data} {what} ({a.share:.1%})" for a, what in measured if a]
        click.echo(f"{name}: {'; '.join(figures) or 'accuracy not measured'}")
    click.echo(f"bundle in {out}; next: mpdsgr validate {out} --report {out}-report")


def _steps(text: str) -> int | Literal["auto"]:
    """Parse --steps. Raises InputError for anything but "auto" or a positive number."""
    if text == "auto":
        return "auto"
    if not (text.isdecimal() and int(text)):
        raise InputError(f"--steps takes a number of time steps, or auto, not {text!r}")
    return int(text)


def _of_module(
    name: str,
    out: Path,
    data: str,
    root: str | None,
    limit: int | None,
    surrogate: str,
    precisions: list[str],
    tier: str | None,
    carry: bool,
) -> "Bundle":
    """Export the module of that name, attacked on the images of `data`, to a bundle."""
    from mpdsgr_deploy.adopt.evaluation_images import evaluation_images
    from mpdsgr_deploy.exporting import export_module, find_module
    from mpdsgr_deploy.recipe import Recipe

    recipe = Recipe.model_validate({"data": {"name": Path(data).stem}})
    images = evaluation_images(data, root, None, limit)
    module = find_module(name)
    return export_module(
        module,
        images,
        out,
        surrogate=surrogate,
        precisions=precisions,
        recipe=recipe,
        tier=tier,
        carry_images=carry,
    )
