"""mpdsgr sign"""

from pathlib import Path

import click

from mpdsgr_deploy.bundle import MANIFEST, Bundle, open_bundle
from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.signing.envelope import Signer
from mpdsgr_deploy.signing.signed_bundle import sign_bundle
from mpdsgr_deploy.signing.verdict import carry_verdict
from mpdsgr_deploy.validation.attestation import sign_report
from mpdsgr_deploy.validation.report import REPORT, Report, load_report

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command("sign")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE|REPORT...")
@click.option(
    "--key", type=FILE, help="PEM file with an EC private key. MPDSGR_KEY_PASSWORD holds its password, if it has one."
)
@click.option(
    "--certificate", type=FILE, help="PEM file with the certificate of --key and its intermediate certificates."
)
@click.option(
    "--sigstore",
    is_flag=True,
    help="Sign through Sigstore with the identity of this CI job or your account; contacts Sigstore's servers.",
)
@json_option
def command(paths: tuple[Path, ...], key: Path | None, certificate: Path | None, sigstore: bool, as_json: bool) -> None:
    """Sign bundles and reports, so that others can check their origin.

    A bundle gets model.sig in the format of OpenSSF model-signing, which `model_signing verify` accepts. It covers
    every file of the bundle. A report, the directory that `mpdsgr validate` wrote, gets verdict.sig: an in-toto
    statement of its verdict and of the digest of the bundle. If the command also names that bundle, the verdict is
    copied into the bundle, where `mpdsgr serve --require-verdict` reads it.

    \b
    Example:
      mpdsgr sign bundles/digits --key ci.pem
      mpdsgr sign bundles/digits reports/digits --key ci.pem
    """
    if sigstore == (key is not None) or (certificate is not None and key is None):
        raise InputError("say who signs: either --key FILE, with --certificate FILE if the key has one, or --sigstore")
    need("model_signing.signing", "sign")
    signer = Signer(key, certificate)
    bundles = [open_bundle(path) for path in paths if (path / MANIFEST).is_file()]
    reports = [(path, *_read_report(path, bundles)) for path in paths if not (path / MANIFEST).is_file()]
    written = [sign_bundle(bundle.path, signer) for bundle in bundles]
    for directory, report, bundle in reports:
        place, content = sign_report(directory, signer)
        written.append(place)
        if bundle is not None:
            written.append(carry_verdict(bundle.path, report.precision, content))
    if as_json:
        print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        click.echo(path)


def _read_report(path: Path, bundles: list[Bundle]) -> tuple[Report, Bundle | None]:
    """Return the report in a directory, and the one of `bundles` that it is about; None if `bundles` is empty.

    Raises InputError if it is not a report, and if it is about none of the bundles.
    """
    if not (path / REPORT).is_file():
        raise InputError(f"{path} is neither a bundle (with {MANIFEST}) nor a directory with {REPORT}")
    report = load_report(path)
    for bundle in bundles:
        if bundle.manifest.digest == report.bundle_sha256:
            bundle.variant(report.precision)
            return report, bundle
    if bundles:
        raise InputError(
            f"{path} is the report of another bundle than {bundles[0].path}; validate that bundle, or sign the two in "
            "separate commands"
        )
    return report, None
