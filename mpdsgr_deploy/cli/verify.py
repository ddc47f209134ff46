"""mpdsgr verify"""

from pathlib import Path

import click

from mpdsgr_deploy.bundle import MANIFEST, Bundle
from mpdsgr_deploy.cli.output import json_option, opened_bundle, print_json
from mpdsgr_deploy.demand import Demand
from mpdsgr_deploy.errors import EvaluationError, InputError, MpdsgrError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.signing.trust import Trust, trust_of_kind
from mpdsgr_deploy.validation.attestation import verify_report
from mpdsgr_deploy.validation.report import REPORT

FILE = click.Path(dir_okay=False)


@click.command("verify")
@click.argument("bundle", metavar="BUNDLE|REPORT")
@click.option("--rebuild", is_flag=True, help="Export again from the weights and compare the files; needs torch.")
@click.option("--key", type=FILE, help="Public key in PEM, by whose private key it must be signed.")
@click.option("--certificate", type=FILE, help="Certificates in PEM, by one of which its signer must be certified.")
@click.option("--identity", metavar="NAME", help="Who must have signed it through Sigstore; asks Sigstore's servers.")
@click.option("--issuer", metavar="URL", help="Who vouches for --identity.")
@json_option
def command(
    bundle: str,
    rebuild: bool,
    key: str | None,
    certificate: str | None,
    identity: str | None,
    issuer: str | None,
    as_json: bool,
) -> None:
    """Check that BUNDLE is whole and consistent, without attacking it, and who signed it.

    Hashes of all files, and the answers of every precision to the golden batch. With --rebuild also that weights and
    recipe give these very files. With a key, certificates or an identity its signature comes first, and then everything
    is read from a private copy of what was signed.

    A REPORT, the directory that `mpdsgr validate` wrote, is checked by its signature alone: every file in it is as it
    was when `mpdsgr sign` signed it.

    Exit code 2 if a hash or a signature is wrong, 3 if something else differs.

    \b
    Example:
      mpdsgr verify bundles/digits --rebuild
      mpdsgr verify bundles/digits --key ci.pub
    """
    trust = _trust(key, certificate, identity, issuer)
    if (Path(bundle) / REPORT).is_file() and not (Path(bundle) / MANIFEST).exists():
        _verify_report(Path(bundle), trust, as_json)
        return
    opened, _ = opened_bundle(bundle, None, trust)
    signer = opened.signed.signer if opened.signed else None
    verdicts = [vouched.verdict for p in opened.manifest.variants if (vouched := Demand(trust).verdict(opened, p))]
    checked = [*(["signature"] if signer else []), "hashes", "golden answers"]
    faults = golden_faults(opened)
    if rebuild:
        need("torch", "train")
        from mpdsgr_deploy.exporting.rebuild import check_rebuilt

        faults += check_rebuilt(opened)
        checked.append("files exported again")
    if as_json:
        signed = {"signer": signer, "verdicts": [verdict.model_dump() for verdict in verdicts]}
        print_json({"bundle": str(bundle), "checked": checked, "faults": faults, **(signed if signer else {})})
    else:
        click.echo(f"{bundle}: {', '.join(checked)}: {'all as they should be' if not faults else ''}")
        for line in [*([f"signed by {signer}"] if signer else []), *(v.line for v in verdicts), *faults]:
            click.echo(f"  {line}")
    if faults:
        raise EvaluationError(f"{bundle} is not what it says: {faults[0]}")


def _trust(key: str | None, certificate: str | None, identity: str | None, issuer: str | None) -> Trust | None:
    """Return the signer that the options name. Raises InputError for several, or an identity without its issuer."""
    if sum(option is not None for option in (key, certificate, identity)) > 1 or (identity is None) != (issuer is None):
        raise InputError("name one signer: --key FILE, --certificate FILE, or --identity NAME with --issuer URL")
    if key is not None:
        return trust_of_kind(key, "key", "--key")
    if certificate is not None:
        return trust_of_kind(certificate, "certificate", "--certificate")
    return None if identity is None else Trust("identity", identity, issuer=issuer or "")


def _verify_report(directory: Path, trust: Trust | None, as_json: bool) -> None:
    if trust is None:
        raise InputError(f"{directory} is a report, which is verified by its signature; name its signer with --key")
    verdict, signer = verify_report(directory, trust)
    if as_json:
        print_json({"report": str(directory), "signer": signer, "verdict": verdict.model_dump()})
        return
    click.echo(f"{directory}: every file is as it was signed\n  signed by {signer}\n  {verdict.line}")


def golden_faults(bundle: Bundle) -> list[str]:
    """Return why a precision cannot be opened here, or how it answers the golden batch wrongly."""
    faults = []
    for precision in bundle.manifest.variants:
        try:
            with open_predictor(bundle, precision=precision):
                pass
        except MpdsgrError as error:
            faults.append(str(error))
    return faults
