"""Whose signatures are accepted: a public key, a certificate authority, or a Sigstore identity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpdsgr_deploy.errors import InputError

Kind = Literal["key", "certificate", "identity"]
PEM: dict[bytes, Kind] = {b"-----BEGIN PUBLIC KEY-----": "key", b"-----BEGIN CERTIFICATE-----": "certificate"}
PRIVATE = b"PRIVATE KEY-----"  # the end of a line with which PEM files of private keys begin


@dataclass(frozen=True)
class Trust:
    """One accepted signer.

    name: a file or an identity, as the user wrote it; pem: the content of the file, which is read only once, so that
    every later check uses the same key; issuer: that of the identity.
    """

    kind: Kind
    name: str
    pem: bytes = b""
    issuer: str = ""

    def __str__(self) -> str:
        return f"{self.name} at {self.issuer}" if self.kind == "identity" else self.name


def required_trust(text: str | None) -> Trust | None:
    """Parse the option --require-signature; None without it or if it is empty. Raises as `parse_trust` does."""
    return parse_trust(text) if text else None


def parse_trust(text: str) -> Trust:
    """Return the signer named by a PEM file with a public key or certificates, or by `IDENTITY,ISSUER` of Sigstore.

    Raises InputError for a file that cannot be read or contains something else, such as a private key.
    """
    identity, comma, issuer = text.rpartition(",")
    if comma and identity and "://" in issuer and not Path(text).expanduser().exists():
        return Trust("identity", identity, issuer=issuer)
    try:
        pem = Path(text).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot read the key {text}: {reason}; give a PEM file with a public key or certificates, or "
            "IDENTITY,ISSUER of Sigstore, such as me@example.com,https://accounts.google.com"
        ) from None
    if PRIVATE in pem:
        raise InputError(
            f"{text} is a private key, which belongs to the signer alone; give its public key, which "
            f"`openssl ec -in {text} -pubout` prints"
        )
    for head, kind in PEM.items():
        if head in pem:
            return Trust(kind, text, pem)
    raise InputError(f"{text} holds neither a public key nor certificates in PEM format")


def trust_of_kind(text: str, kind: Kind, option: str) -> Trust:
    """Read the file `text` of an option. Raises InputError as `parse_trust` does, and for another kind of signer."""
    trust = parse_trust(text)
    if trust.kind != kind:
        raise InputError(f"{option} {text} holds a {trust.kind}; give it with --{trust.kind}")
    return trust


def beside(file: Path, text: str) -> str:
    """Return the path of a key that a TOML file names, relative to that file's directory; other texts are unchanged."""
    return str(file.parent / text) if (file.parent / text).is_file() else text
