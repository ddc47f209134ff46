"""mpdsgr inspect"""

from pathlib import Path

import click

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.bundle import MANIFEST, Bundle, open_bundle
from mpdsgr_deploy.cli.ignored import refuse_all_but, refuse_ignored
from mpdsgr_deploy.cli.inspect_pair import inspect_pair
from mpdsgr_deploy.cli.inspect_steps import IMAGES as STEP_IMAGES
from mpdsgr_deploy.cli.inspect_steps import inspect_steps
from mpdsgr_deploy.cli.output import json_option, opened_bundle, print_json, print_table
from mpdsgr_deploy.diagnostics.facts import bundle_facts, checkpoint_facts
from mpdsgr_deploy.diagnostics.layer_statistics import warnings_of
from mpdsgr_deploy.diagnostics.spike_flips import flips_of
from mpdsgr_deploy.diagnostics.tables import flip_table, membrane_table
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.surrogates import trained_surrogate

LAST_EPOCH = "the last epoch's first validation batch"
IMAGES = 128  # the default number of test images


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("other", required=False)
@click.option("--flips", is_flag=True, help="Compare a bundle's other precisions with fp32, spike by spike.")
@click.option("--steps", is_flag=True, help="Attack and time a bundle's networks with 1 to T time steps; needs torch.")
@click.option(
    "--plots", type=click.Path(path_type=Path), help="Directory for plots of flips, steps or membrane potentials."
)
@click.option("--root", help="Directory of the data set.  [default: the recipe's data.root]")
@click.option(
    "--limit",
    "--images",
    "images",
    type=click.IntRange(1),
    help=f"Number of test images to measure.  [default: {IMAGES}; with --steps {STEP_IMAGES}]",
)
@click.option("--card", "as_card", is_flag=True, help="Print a bundle's model card for the Hugging Face Hub.")
@click.option("--report", type=click.Path(path_type=Path), help="Validation report to quote on the model card.")
@click.option(
    "--attack-graph",
    "attack_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write an ONNX file with a bundle's network, its losses and their gradients with respect to the images.",
)
@click.option(
    "--layer", "layers", multiple=True, metavar="NAME", help="Plot only this layer of a checkpoint; may be repeated."
)
@click.option(
    "--channel",
    "channels",
    multiple=True,
    type=click.IntRange(0),
    help="Also plot this channel of the layers; may be repeated.",
)
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
    """Show a bundle, a run or a checkpoint, or compare two of them.

    PATH is a bundle, a training run or a checkpoint; every hash in it is verified. With OTHER, the command compares two
    of these, or two validation reports: settings, training curves, spikes and membrane potentials on the same images,
    and the results per image with the p-value of McNemar's test. It names each part that cannot be compared, and the
    reason. BUNDLE@PRECISION chooses a network of a bundle.

    --plots of a run or checkpoint measures its network on test images and plots the membrane potentials of every layer,
    time step and channel, with the Gaussians that the paper's Theorem 1 assumes and the window in which the surrogate
    gradient is not zero.

    --flips shows for every layer of the other precisions the share of spikes that differ from fp32 (flips), the change
    of the membrane potentials, and their density at the threshold. A flip in one layer causes flips in later layers.
    The column `by its own rounding` counts only the flips of a layer whose input spikes are those of fp32.

    --steps exports the network again with 1 to T time steps and shows for each number and precision: accuracy without
    attack, under PGD and under all attacks of tier commit, the images whose result changes against T steps, the time,
    and the multiply-accumulate operations. Choose a number for `mpdsgr export --steps` from it.

    --attack-graph writes the network of BUNDLE or BUNDLE@PRECISION as `mpdsgr validate` attacks it: the nodes of the
    network, followed by the cross-entropy and DLR losses and their gradients with respect to the images, computed with
    the surrogate gradient of the training.

    --card prints a README.md with the metadata that the Hugging Face Hub reads, made from the bundle and the report.

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
        refuse_all_but("--attack-graph", "path", "attack_file")
        write_attack_graph(str(path), attack_file)
        return
    if other is not None:
        refuse_ignored("a comparison of two paths", "flips", "steps", "as_card", "report", "layers", "channels")
        if plots is not None:
            need("matplotlib", "report")
        inspect_pair(str(path), other, plots=plots, root=root, images=images or IMAGES, as_json=as_json)
        return
    is_bundle = (path / MANIFEST).exists()
    if (flips or steps or as_card) and not is_bundle:
        raise InputError(f"--flips, --steps and --card need a bundle, and {path} is not one; export it first")
    if as_card:
        refuse_all_but("--card", "path", "as_card", "report")
        from mpdsgr_deploy.validation.card import card, report_about

        bundle = open_bundle(path)
        click.echo(card(bundle, None if report is None else report_about(bundle, report)), nl=False)
        return
    refuse_unmeasured(is_bundle, flips=flips, steps=steps, plots=plots is not None)
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


def refuse_unmeasured(is_bundle: bool, *, flips: bool, steps: bool, plots: bool) -> None:
    """Raise InputError for options that the chosen measurement, if any, of a bundle or a checkpoint ignores."""
    of_checkpoints, of_measurements = ("layers", "channels"), ("root", "images")
    if steps:
        refuse_ignored("--steps", "flips", "report", *of_checkpoints)
    elif flips:
        refuse_ignored("--flips", "report", *of_checkpoints)
    elif is_bundle:
        refuse_ignored(
            "a bundle without --flips, --steps or --card", "report", "plots", *of_measurements, *of_checkpoints
        )
    elif plots:
        refuse_ignored("--plots", "report")
    else:
        refuse_ignored("a checkpoint without --plots", "report", *of_measurements, *of_checkpoints)


def write_attack_graph(bundle: str, out: Path) -> None:
    """Write the attack graph of BUNDLE[@PRECISION], through the surrogate of its training, to the file `out`.

    Raises InputError if the network has no attack graph, and if `out` is a file of the bundle.
    """
    from mpdsgr_deploy.attack_graph import derived

    opened, precision = opened_bundle(bundle, None)
    opened.refuse_output(out, "--attack-graph")
    surrogate = trained_surrogate(opened.manifest.recipe)
    write_atomic(out, derived(opened.variant(precision), surrogate))
    click.echo(f"attack graph of {opened.path}@{precision} through {surrogate} in {out}")


def inspect_bundle(
    bundle: Bundle, flips: bool, plots: Path | None, root: str | None, images: int, as_json: bool
) -> None:
    """Print facts about a bundle and, with `flips`, how its precisions differ layer by layer; `plots` draws that."""
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
    """Print facts about a checkpoint and the statistics of its layers, which are measured again if they are plotted."""
    facts, statistics = checkpoint_facts(path)
    where = LAST_EPOCH
    if plots is not None:
        need("torch", "train")
        from mpdsgr_deploy.diagnostics.checkpoint_plots import plot_checkpoint

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
