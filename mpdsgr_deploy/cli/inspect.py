"""mpdsgr inspect"""

from pathlib import Path

import click

from mpdsgr_deploy.bundle import MANIFEST, Bundle, open_bundle
from mpdsgr_deploy.cli.inspect_pair import inspect_pair
from mpdsgr_deploy.cli.inspect_steps import IMAGES as STEP_IMAGES
from mpdsgr_deploy.cli.inspect_steps import inspect_steps
from mpdsgr_deploy.cli.output import json_option, opened_bundle, print_json, print_table
from mpdsgr_deploy.diagnostics.facts import bundle_facts, checkpoint_facts
from mpdsgr_deploy.diagnostics.flips import flips_of
from mpdsgr_deploy.diagnostics.layer_statistics import warnings_of
from mpdsgr_deploy.diagnostics.tables import flip_table, membrane_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.surrogates import trained_surrogate

LAST_EPOCH = "the last epoch's first validation batch"
IMAGES = 128


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("other", required=False)
@click.option("--flips", is_flag=True, help="Compare a bundle's precisions with fp32, spike by spike.")
@click.option("--steps", is_flag=True, help="Attack and time a bundle's networks at 1 to T time steps; needs torch.")
@click.option("--plots", type=click.Path(path_type=Path), help="Directory to draw flips, steps or the membrane into.")
@click.option("--root", help="Where the data set lies.  [default: the recipe's]")
@click.option(
    "--limit",
    "--images",
    "images",
    type=click.IntRange(1),
    help=f"How many test images are measured.  [default: {IMAGES}; with --steps {STEP_IMAGES}]",
)
@click.option("--card", "as_card", is_flag=True, help="Write a bundle's model card, for the Hugging Face Hub.")
@click.option("--report", type=click.Path(path_type=Path), help="Validation report to put on the card.")
@click.option(
    "--attack-graph",
    "attack_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a bundle's network with its losses and their gradient in the images, as ONNX.",
)
@click.option("--layer", "layers", multiple=True, metavar="NAME", help="Draw a checkpoint's layer, not all.")
@click.option("--channel", "channels", multiple=True, type=click.IntRange(0), help="Draw a channel of it too.")
@json_option
def command(
    path: Path,
    other: str | None,
    flips: bool,
    steps: bool,
    plots: Path | None,
    root: str | None,
    images: int | None,
    as_card: bool,
    report: Path | None,
    attack_file: Path | None,
    layers: tuple[str, ...],
    channels: tuple[int, ...],
    as_json: bool,
) -> None:
    """Show what PATH holds: a bundle, a training run or a checkpoint. Verifies every hash on the way.

    With OTHER two of these, or of validation reports, are compared, as far as both have it: settings, training curves,
    spikes and membrane potentials on the same images (--plots draws them), recorded verdicts with McNemar's p. What
    cannot be compared is named with the reason. A bundle's network is chosen as BUNDLE@PRECISION.

    --plots measures a training run's or a checkpoint's network anew, on test images, and draws the potentials of every
    layer, step and channel beside the Gaussians of Theorem 1 and the surrogate's window.

    --flips shows for every layer of a bundle's other precisions which share of the spikes differs from fp32 (flips),
    how far potentials moved, and how densely they lie at the threshold. A flip upstream causes flips downstream; `by
    its own rounding` are those of a layer that is given the spikes of fp32. An image's drift begins in the first layer
    with a flip. With --plots it is drawn too.

    --steps exports the network at 1 to T time steps again and shows what each number costs, for every precision:
    accuracy clean, under PGD and under all attacks of tier commit, the images that flip against T steps, time and
    multiply-accumulates. `mpdsgr export --steps` then exports so many.

    --attack-graph writes the network of BUNDLE or BUNDLE@PRECISION as a validation attacks it: its own nodes, and
    behind them cross-entropy, DLR and their gradient in the images, through the surrogate that it was trained with.

    --card prints a README.md with the metadata that the Hugging Face Hub reads, nothing in it typed by hand.

    \b
    Example:
      mpdsgr inspect bundles/digits --flips
      mpdsgr inspect bundles/digits --steps --plots plots/digits-steps
      mpdsgr inspect bundles/digits@int8 --attack-graph digits.attack.int8.onnx
      mpdsgr inspect bundles/digits --card --report reports/digits-fp32 > README.md
      mpdsgr inspect runs/digits --plots plots/digits
      mpdsgr inspect runs/digits bundles/digits@int8 --plots plots/digits-int8
    """
    if attack_file is not None:
        if other or flips or steps or plots or root or images or as_card or report or layers or channels or as_json:
            raise InputError("--attack-graph writes a file and shows nothing; leave out other options")
        write_attack_graph(str(path), attack_file)
        return
    if other is not None:
        if flips or steps or as_card or report or layers or channels:
            raise InputError("two paths are compared; leave out --flips, --steps, --card, --report, --layer, --channel")
        if plots is not None:
            need("matplotlib", "report")
        inspect_pair(str(path), other, plots=plots, root=root, images=images or IMAGES, as_json=as_json)
        return
    is_bundle = (path / MANIFEST).exists()
    if flips and steps:
        raise InputError("--flips and --steps measure two things; give one of them at a time")
    if (flips or steps) and not is_bundle:
        raise InputError(f"--flips and --steps are about a bundle; {path} is none")
    if is_bundle and ((plots and not (flips or steps)) or layers or channels):
        raise InputError(f"{path} is a bundle; add --flips or --steps to draw it, without --layer and --channel")
    if not (flips or steps or plots) and (root or images or layers or channels):
        raise InputError(
            "--root, --images, --layer and --channel say what to measure; add --plots DIRECTORY, --flips or --steps"
        )
    if as_card:
        if flips or steps or plots or as_json or not is_bundle:
            raise InputError("--card is for a bundle, without --flips, --steps, --plots and --json")
        print_card(open_bundle(path), report)
        return
    if report is not None:
        raise InputError("--report is what --card quotes; add --card")
    if plots is not None:
        need("matplotlib", "report")
    if steps:
        inspect_steps(open_bundle(path), plots=plots, root=root, images=images, as_json=as_json)
    elif is_bundle:
        inspect_bundle(open_bundle(path), flips, plots, root, images or IMAGES, as_json)
    else:
        inspect_checkpoint(path, plots, root, images or IMAGES, layers, channels, as_json)
    if plots is not None and not as_json:
        click.echo(f"plots in {plots}")


def print_card(bundle: Bundle, report: Path | None) -> None:
    """Print the bundle's model card."""
    from mpdsgr_deploy.validation.card import card, report_about

    click.echo(card(bundle, None if report is None else report_about(bundle, report)), nl=False)


def write_attack_graph(bundle: str, out: Path) -> None:
    """Write the attack graph of BUNDLE[@PRECISION]. Raises InputError where a validation would."""
    from mpdsgr_deploy.attack_graph import derived

    opened, precision = opened_bundle(bundle, None)
    opened.refuse_output(out, "--attack-graph")
    surrogate = trained_surrogate(opened.manifest.recipe)
    write_atomic(out, derived(opened.variant(precision), surrogate))
    click.echo(f"attack graph of {opened.path}@{precision} through {surrogate} in {out}")


def inspect_bundle(
    bundle: Bundle, flips: bool, plots: Path | None, root: str | None, images: int, as_json: bool
) -> None:
    """Print facts of a bundle and, with `flips`, where its precisions drift apart."""
    facts = bundle_facts(bundle)
    where, variants = flips_of(bundle, root=root, images=images) if flips else ("", [])
    if plots is not None:
        from mpdsgr_deploy.diagnostics.flip_plots import plot_flips

        plot_flips(variants, plots)
    if as_json:
        records = [{**variant._asdict(), "steps": [step._asdict() for step in variant.steps]} for variant in variants]
        print_json(facts | ({"flips": records, "measured on": where} if flips else {}))
        return
    print_table(("", str(bundle.path)), list(facts.items()))
    for variant in variants:
        print_table(*flip_table(variant, bundle.manifest.variants[variant.precision].layers, where))


def inspect_checkpoint(
    path: Path,
    plots: Path | None,
    root: str | None,
    images: int,
    layers: tuple[str, ...],
    channels: tuple[int, ...],
    as_json: bool,
) -> None:
    """Print facts of a checkpoint and the statistics of its layers, measured anew if they are also drawn."""
    facts, statistics = checkpoint_facts(path)
    where = LAST_EPOCH
    if plots is not None:
        need("torch", "train")
        from mpdsgr_deploy.diagnostics.checkpoint import plot_checkpoint

        where, statistics = plot_checkpoint(path, plots, root=root, layers=layers, channels=channels, images=images)
    warnings = warnings_of(statistics)
    if as_json:
        print_json({**facts, "layers": [layer._asdict() for layer in statistics], "warnings": warnings})
        return
    print_table(("", str(path)), list(facts.items()))
    if statistics:
        print_table(*membrane_table(statistics, where))
    for line in warnings:
        click.echo(f"warning: {line}")
