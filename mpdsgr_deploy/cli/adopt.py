"""mpdsgr adopt"""

from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.cli.ignored import refuse_all_but
from mpdsgr_deploy.cli.number_list import number_list
from mpdsgr_deploy.cli.output import json_option, print_json, print_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.schema import override, parse

SHOWN = 20  # the largest number of unsupported nodes that are listed


@click.command("adopt")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--images",
    metavar="DATA",
    help="Test images to attack: a data set's name, a folder of CLASS/NAME.png, or an .npz file.",
)
@click.option("--root", help="Directory of the data set, if --images names one.")
@click.option(
    "--surrogate",
    default="triangle:1",
    show_default=True,
    help="Surrogate gradient of the spikes: KIND, KIND:WIDTH or, where the reset passes no gradient, "
    "KIND:WIDTH+detached.",
)
@click.option(
    "--labels",
    help="Names of the classes in the order of the logits, separated by commas, or a file with one per line.",
)
@click.option(
    "--mean",
    metavar="M,...",
    help="Mean of the pixels, one per channel or one for all, if the network takes (x - mean) / std.",
)
@click.option("--std", metavar="S,...", help="Standard deviation of the pixels; see --mean.")
@click.option(
    "--range",
    "pixels",
    metavar="LOW,HIGH",
    help="Range of the pixels that the network takes, such as 0,255.  [default: 0,1]",
)
@click.option(
    "--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", show_default=True, help="Layout of the input."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME=FILE",
    help="ONNX file of the same network in another precision, such as int8=net.int8.onnx; may be repeated.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help=".npz file with the array `logits` that the original framework computes for the images; MODEL must match it.",
)
@click.option("--limit", type=click.IntRange(1), help="Use only the first N images.")
@click.option("--tier", help=f"Which set of attacks to run for the reference: {', '.join(TIERS)}.  [default: commit]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a field of the recipe, such as attack.eps=4/255; may be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Bundle directory to write.")
@click.option("--check", is_flag=True, help="Report which nodes an attack can pass, and how, and write nothing.")
@json_option
def command(
    model: Path,
    images: str | None,
    root: str | None,
    surrogate: str,
    labels: str | None,
    mean: str | None,
    std: str | None,
    pixels: str | None,
    layout: str,
    variants: tuple[str, ...],
    reference: Path | None,
    limit: int | None,
    tier: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    check: bool,
    as_json: bool,
) -> None:
    """Make a bundle of an ONNX classifier from elsewhere.

    MODEL is an ONNX file: a spiking network from SpikingJelly, snnTorch, Norse or sinabs whose time steps are unrolled,
    or an ordinary network. It is attacked, and the results are stored as the reference for `mpdsgr validate`. A file
    that takes float32 [batch, C, H, W] in [0, 1] is deployed unchanged. For any other input, describe it with --mean
    and --std, --range or --layout; nodes that convert the images are then put in front.

    Spikes are recognised by the pattern of their nodes. A comparison that matches no pattern is an error: an attack
    would get no gradient through it, and the network would only look robust.

    --check reports for each node between images and logits whether its gradient is faithful, approximate or
    unsupported.

    \b
    Example:
      mpdsgr adopt net.onnx --check
      mpdsgr adopt net.onnx --images cifar10 --root data --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --out bundles/net
      mpdsgr validate bundles/net --report reports/net
    """
    if check:
        refuse_all_but("--check", "model", "surrogate", "mean", "std", "pixels", "layout", "check", "as_json")
    from mpdsgr_deploy.adoption import Preprocessing, adopt, read_classifier, survey
    from mpdsgr_deploy.adoption.evaluation_images import evaluation_images

    low, high = (0.0, 1.0) if pixels is None else number_list("--range", pixels, float, "0,255", counts=(2, 2))
    means = [] if mean is None else number_list("--mean", mean, float, "0.49,0.48,0.45")
    stds = [] if std is None else number_list("--std", std, float, "0.25,0.24,0.26", low=1e-6)
    before = Preprocessing(low, high, tuple(means), tuple(stds), layout)  # type: ignore[arg-type]
    if bool(means) != bool(stds):
        raise InputError("--mean and --std belong together; give both or neither")
    if check:
        _report(survey(read_classifier(model, before).network, surrogate), str(model), as_json)
        return
    if images is None or out is None:
        raise InputError("give --images, on which the network is attacked, and --out; or --check to look only")
    shape = read_classifier(model, before).shape
    test_images = evaluation_images(images, root, shape, limit)
    files = [_variant(text) for text in variants]
    if twice := [name for name, count in Counter(name for name, _ in files).items() if count > 1]:
        raise InputError(f"--variant names {twice[0]} more than once; give each precision a name of its own")
    values: dict[str, Any] = {"data": {"name": Path(images).stem}}
    override(values, overrides, example="attack.eps=4/255")
    bundle = adopt(
        model,
        test_images,
        out,
        surrogate=surrogate,
        preprocessing=before,
        labels=_labels(labels),
        variants=dict(files),
        reference=None if reference is None else _logits(reference),
        recipe=parse(Recipe, values, "--set"),
        tier=tier,
    )
    manifest = bundle.manifest
    if as_json:
        reference_json = manifest.reference and manifest.reference.model_dump()
        print_json({"bundle": str(out), **manifest.provenance["adopted"], "reference": reference_json})
        return
    for name, variant in manifest.variants.items():
        if variant.accuracy:
            a = variant.accuracy
            click.echo(f"{name}: {a.correct} of {a.n} {a.data} images correct ({a.share:.1%})")
    if manifest.reference is not None:
        worst = manifest.reference.correct["worst"]
        click.echo(f"under every attack of tier {manifest.reference.tier}: {worst} of {manifest.reference.n} correct")
    click.echo(f"bundle in {out}; next: mpdsgr validate {out} --report {out}-report")


def _labels(text: str | None) -> list[str]:
    if text is None:
        return []
    lines = Path(text).read_text().splitlines() if Path(text).is_file() else text.split(",")
    return [line.strip() for line in lines if line.strip()]


def _variant(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not name.isidentifier() or name == "fp32":
        raise InputError(f"--variant {text!r}: write NAME=FILE, for example int8=net.int8.onnx; fp32 is MODEL itself")
    return name, Path(file)


def _logits(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logits = arrays["logits"]
    except Exception as error:  # numpy raises many types for files that it did not write
        raise InputError(f"{path} does not hold an array `logits` ({error}); write it with numpy.savez") from None
    if logits.ndim != 2 or logits.dtype.kind != "f":
        raise InputError(f"{path}: logits must be numbers [N, K], these are {logits.dtype} {list(logits.shape)}")
    return logits


def _report(surveyed: Any, source: str, as_json: bool) -> None:
    """Print a survey. Raises InputError afterwards if the network cannot be attacked."""
    counts = surveyed.counts()
    if as_json:
        print_json(
            {
                "attackable": not surveyed.refused,
                "nodes": [finding._asdict() for finding in surveyed.findings],
                "spike nodes": surveyed.spikes,
                "layers": surveyed.layers,
                "time steps": surveyed.steps,
            }
        )
    else:
        kinds = Counter((f.status, f.operator, f.why) for f in surveyed.findings if f.status == "approximate")
        rows = [(operator, status, count, why) for (status, operator, why), count in kinds.items()]
        unsupported = [f for f in surveyed.findings if f.status == "unsupported"]
        rows += [(f"{f.operator} {f.node}", f.status, 1, f.why) for f in unsupported[:SHOWN]]
        click.echo(f"{source}: " + ", ".join(f"{n} nodes {status}" for status, n in counts.items()))
        click.echo(f"{surveyed.spikes} spike nodes in {len(surveyed.layers)} layers, up to {surveyed.steps} time steps")
        print_table(("operator", "gradient", "nodes", "why"), rows)
    if surveyed.refused:
        raise InputError(surveyed.refused)
