"""mpdsgr verify"""

from collections.abc import Sequence
from pathlib import Path

import click

from mpdsgr_deploy.bundle import MANIFEST, Bundle
from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.output import json_option, opened_precisions, print_json
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
@click.option("--rebuild", is_flag=True, help="Also export again from the weights and compare the files; needs torch.")
@click.option("--key", type=FILE, help="PEM file with the public key of the required signer.")
@click.option(
    "--certificate",
    type=FILE,
    help="PEM file with certificates, one of which must have issued the signer's certificate.",
)
@click.option(
    "--identity",
    metavar="NAME",
    help="Identity of the required signer in Sigstore, such as an e-mail address; contacts Sigstore's servers.",
)
@click.option("--issuer", metavar="URL", help="OpenID Connect provider that confirmed --identity.")
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
    """Check a bundle's hashes, answers and signature, without attacks.

    The answers are those of every precision, or of that of BUNDLE@PRECISION, to the golden batch, a few images whose
    logits are stored in the bundle. --rebuild also checks that the weights and the recipe give exactly these files.
    With --key, --certificate or --identity the signature is checked first, and all later checks read a private copy of
    the signed files.

    Of a REPORT, a directory that `mpdsgr validate` wrote, only the signature is checked: no file may have changed since
    `mpdsgr sign` signed it.

    Exit code: 2 if a hash or a signature is wrong, 3 if an answer or a rebuilt file differs.

    \b
    Example:
      mpdsgr verify bundles/digits --rebuild
      mpdsgr verify bundles/digits --key ci.pub
    """
    is_report = (Path(bundle) / REPORT).is_file() and not (Path(bundle) / MANIFEST).exists()
    if is_report:
        refuse_ignored("a REPORT", "rebuild")
    trust = _trust(key, certificate, identity, issuer)
    if is_report:
        _verify_report(Path(bundle), trust, as_json)
        return
    opened, precisions = opened_precisions(bundle, trust=trust)
    signer = opened.signed.signer if opened.signed else None
    verdicts = [vouched.verdict for p in precisions if (vouched := Demand(trust).verdict(opened, p))]
    checked = [*(["signature"] if signer else []), "hashes", "golden answers"]
    faults = golden_faults(opened, precisions)
    if rebuild:
        need("torch", "train")
        from mpdsgr_deploy.exporting.rebuild import check_rebuilt

        faults += check_rebuilt(opened)
        checked.append("files exported again")
    if as_json:
        signed = {"signer": signer, "verdicts": [verdict.model_dump() for verdict in verdicts]}
        print_json({"bundle": str(bundle), "checked": checked, "faults": faults, **(signed if signer else {})})
    else:
        click.echo(f"{bundle}: checked {', '.join(checked)}: {'all correct' if not faults else 'not all correct'}")
        for line in [*([f"signed by {signer}"] if signer else []), *(v.line for v in verdicts), *faults]:
            click.echo(f"  {line}")
    if faults:
        raise EvaluationError(f"{bundle} does not match its manifest: {faults[0]}")


def _trust(key: str | None, certificate: str | None, identity: str | None, issuer: str | None) -> Trust | None:
    """Return the signer that the options name, or None. Raises InputError for several or incomplete ones."""
    if sum(option is not None for option in (key, certificate, identity)) > 1 or (identity is None) != (issuer is None):
        raise InputError("give one signer: --key FILE, --certificate FILE, or --identity NAME with --issuer URL")
    if key is not None:
        return trust_of_kind(key, "key", "--key")
    if certificate is not None:
        return trust_of_kind(certificate, "certificate", "--certificate")
    return None if identity is None else Trust("identity", identity, issuer=issuer or "")


def _verify_report(directory: Path, trust: Trust | None, as_json: bool) -> None:
    if trust is None:
        raise InputError(
            f"{directory} is a report, of which only the signature can be verified; give its signer's --key"
        )
    verdict, signer = verify_report(directory, trust)
    if as_json:
        print_json({"report": str(directory), "signer": signer, "verdict": verdict.model_dump()})
        return
    click.echo(f"{directory}: no file has changed since it was signed\n  signed by {signer}\n  {verdict.line}")


def golden_faults(bundle: Bundle, precisions: Sequence[str]) -> list[str]:
    """Return one line per one of `precisions` that cannot be opened here or answers the golden batch wrongly."""
    faults = []
    for precision in precisions:
        try:
            with open_predictor(bundle, precision=precision):
                pass
        except MpdsgrError as error:
            faults.append(str(error))
    return faults
