"""mpdsgr verify"""

import click

from mpdsgr_deploy.attack_graph import derived_attack_graph
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.cli.output import json_option, opened_bundle, print_json
from mpdsgr_deploy.errors import EvaluationError, MpdsgrError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime import open_predictor


@click.command("verify")
@click.argument("bundle")
@click.option("--rebuild", is_flag=True, help="Export again from the weights and compare the files; needs torch.")
@json_option
def command(bundle: str, rebuild: bool, as_json: bool) -> None:
    """Check that BUNDLE is whole and consistent, without attacking it.

    Hashes of all files, the answers of every precision to the golden batch, and each attack graph, derived again from
    its network. With --rebuild also that weights and recipe give these very files. Exit code 3 if something differs.

    \b
    Example:
      mpdsgr verify bundles/digits --rebuild
    """
    opened, _ = opened_bundle(bundle, None)
    checked = ["hashes", "golden answers", "attack graphs"]
    faults = [*golden_faults(opened), *attack_graph_faults(opened)]
    if rebuild:
        need("torch", "train")
        from mpdsgr_deploy.exporting.rebuild import check_rebuilt

        faults += check_rebuilt(opened)
        checked.append("files exported again")
    if as_json:
        print_json({"bundle": str(bundle), "checked": checked, "faults": faults})
    else:
        click.echo(f"{bundle}: {', '.join(checked)}: {'all as they should be' if not faults else ''}")
        for fault in faults:
            click.echo(f"  {fault}")
    if faults:
        raise EvaluationError(f"{bundle} is not what it says: {faults[0]}")


def golden_faults(bundle: Bundle) -> list[str]:
    """Why a precision cannot be opened here, or does not answer the golden batch as it must."""
    faults = []
    for precision in bundle.manifest.variants:
        try:
            with open_predictor(bundle, precision=precision):
                pass
        except MpdsgrError as error:
            faults.append(str(error))
    return faults


def attack_graph_faults(bundle: Bundle) -> list[str]:
    """Attack graphs that are not the derivatives of their networks."""
    variants = bundle.manifest.variants
    stored = {precision: bundle.attack(precision) for precision, variant in variants.items() if variant.attack}
    wrong = [path for p, path in stored.items() if path.read_bytes() != derived_attack_graph(bundle, p)]
    return [f"{path.name} is not the derivative of its network" for path in wrong]
