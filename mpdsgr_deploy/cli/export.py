"""mpdsgr export"""

from pathlib import Path

import click

from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory to write.")
@click.option("--precision", default="fp32", show_default=True, help="Precisions to export, comma-separated.")
@click.option("--root", help="Where the data set lies, for accuracy and golden inputs.  [default: the recipe's]")
@click.option("--limit", type=click.IntRange(1), help="Measure accuracy on the first so many test images only.")
@json_option
def command(checkpoint: Path, out: Path, precision: str, root: str | None, limit: int | None, as_json: bool) -> None:
    """Turn CHECKPOINT (a training run or one of its checkpoints) into a deployment bundle.

    The ONNX file is compared with the torch model before anything is written.

    \b
    Example:
      mpdsgr export runs/digits-mpdsgr --out bundles/digits
    """
    if set(precision.split(",")) != {"fp32"}:
        raise InputError(f"--precision {precision}: this version exports fp32 only")
    need("onnxscript", "train")
    from mpdsgr_deploy.export import export

    bundle = export(checkpoint, out, root=root, limit=limit)
    variants = {name: v.model_dump() for name, v in bundle.manifest.variants.items()}
    if as_json:
        print_json({"bundle": str(out), "variants": variants})
        return
    accuracy = bundle.manifest.variants["fp32"].accuracy
    if accuracy:
        share = accuracy.correct / accuracy.n
        click.echo(f"fp32: {accuracy.correct} of {accuracy.n} {accuracy.data} test images correct ({share:.1%})")
    click.echo(f"bundle in {out}; next: mpdsgr validate {out} --report {out}-report")
