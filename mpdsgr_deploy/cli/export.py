"""mpdsgr export"""

from pathlib import Path
from typing import Literal

import click

from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.checkpoint import CHOICES, Choice
from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import Recipe


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory to write.")
@click.option(
    "--checkpoint",
    "choice",
    type=click.Choice(CHOICES),
    help="Which epoch of RUN to export: the last, or the one with the best validation score.  [default: last]",
)
@click.option(
    "--precision",
    default="",
    metavar="P,...",
    help="Also export these precisions besides fp32: fp16, int8, fp8, separated by commas.",
)
@click.option(
    "--steps",
    metavar="N|auto",
    help="Export only the first N time steps, or with auto the fewest that keep to --max-drop.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    help="Largest drop of accuracy, clean and under attack, that a precision or --steps may cause, as a share of the "
    "images: 0.005 is half a point.",
)
@click.option("--root", help="Directory of the data set.  [default: the recipe's data.root]")
@click.option("--limit", type=click.IntRange(1), help="Measure accuracy on only N test images, the same in every call.")
@click.option(
    "--tier",
    help=f"Which set of attacks to run on the torch network: {', '.join(TIERS)}.  [default: the recipe's gate.tier]",
)
@click.option("--data", help="Images for a module: a data set's name, a folder of CLASS/NAME.png, or an .npz file.")
@click.option(
    "--surrogate",
    default="triangle:1",
    show_default=True,
    help="For a module: the surrogate gradient of its spikes, as KIND or KIND:WIDTH.",
)
@click.option(
    "--images/--no-images",
    default=True,
    show_default=True,
    help="Store the test images in the bundle, or leave them out.",
)
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
    """Export a trained network to a bundle with ONNX files.

    RUN is a training run, one of its checkpoints, or package.module:function. The ONNX file is compared with the torch
    network before anything is written. Then the torch network is attacked with the attacks that `mpdsgr validate` will
    run on the exported one. The bundle stores the results as the reference, and the test images too, so that a machine
    without torch and without the data set can validate it. Use --no-images if the licence of the images forbids
    copies. --tier release takes 1,000 images and stronger attacks than the default, commit.

    Reduced precisions are also compared under attack. With --max-drop 0.005 none may lose more than half a point of
    accuracy: the layers of int8 and fp8 that lose most are set back to fp16 (those of fp16 to fp32), until all keep to
    it.

    --steps N exports a network that answers after the first N time steps; all measurements in the bundle are then of
    that network. --steps auto takes the smallest N for which validation images rule out a drop of more than --max-drop
    (default: the tier's) with 95 % confidence, clean and under attack. `mpdsgr inspect BUNDLE --steps` shows accuracy
    and time for each N.

    package.module:function is a function that returns any torch module which maps images to logits. --data names the
    images on which it is attacked.

    \b
    Example:
      mpdsgr export runs/digits-mpdsgr --out bundles/digits --precision fp16,int8
      mpdsgr export runs/vgg11 --out bundles/vgg11 --precision int8 --tier release --root data
    """
    is_module = ":" in run.name and not run.exists()
    if is_module:
        refuse_ignored("the export of a module", "choice", "steps", "max_drop")
    else:
        refuse_ignored("the export of a training run", "data", "surrogate")
    need("onnxscript", "train")
    from mpdsgr_deploy.adoption.evaluation_images import evaluation_images
    from mpdsgr_deploy.exporting import export, export_module, find_module

    precisions = [name.strip() for name in precision.split(",") if name.strip()]
    if is_module:
        if data is None:
            raise InputError(f"{run} is a module; name the images on which it is attacked with --data")
        sample = evaluation_images(data, root, None, limit)
        bundle = export_module(
            find_module(str(run)),
            sample,
            out,
            surrogate=surrogate,
            precisions=precisions,
            recipe=Recipe.model_validate({"data": {"name": Path(data).stem}}),
            tier=tier,
            carry_images=images,
        )
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
    if text == "auto":
        return "auto"
    if not (text.isdecimal() and int(text)):
        raise InputError(f"--steps takes a number of time steps, or auto, not {text!r}")
    return int(text)
