"""Sign and verify DSSE envelopes in Sigstore bundles; the only module that calls model-signing.

model-signing has public functions only for signatures of directories. Other statements are passed to the signer and the
verifier that these functions use internally.
"""

import json
import os
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mpdsgr_deploy.errors import InputError, explained, one_line
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.signing.trust import Kind, Trust

PAYLOAD, STATEMENT = "application/vnd.in-toto+json", "https://in-toto.io/Statement/v1"
LARGEST = 16 << 20  # bytes of the largest signature
PASSWORD = "MPDSGR_KEY_PASSWORD"
# by the material in an envelope, the kinds of trust that can verify it; early Sigstore bundles have a chain
MATERIAL: dict[str, tuple[Kind, ...]] = {
    "publicKey": ("key",),
    "x509CertificateChain": ("certificate", "identity"),
    "certificate": ("identity",),
}
Statement = dict[str, Any]


@dataclass(frozen=True)
class Signer:
    """The signer: an EC private key, with a file of its certificate and chain if there is one, or else Sigstore.

    The password of a key is read from the environment variable MPDSGR_KEY_PASSWORD. Without a key, the identity is that
    of a CI job's token in the environment, or one that a browser confirms.
    """

    key: Path | None = None
    certificate: Path | None = None

    def config(self) -> Any:
        """Return a signing configuration of model-signing. Raises InputError if that is missing, and its errors."""
        config = need("model_signing.signing", "sign").Config()
        if self.key is None:
            return config.use_sigstore_signer(use_ambient_credentials=True)
        if self.certificate is not None:
            return config.use_certificate_signer(
                private_key=self.key, signing_certificate=self.certificate, certificate_chain=[self.certificate]
            )
        password = os.environ.get(PASSWORD)
        return config.use_elliptic_key_signer(private_key=self.key, password=password.encode() if password else None)

    def explain(self, error: Exception) -> InputError:
        if self.key is None:
            return InputError(f"cannot sign with a Sigstore identity: {one_line(error)}")
        return InputError(
            f"cannot sign with {self.key}: {one_line(error)}; the key must be an EC key of P-256, P-384 or P-521, and "
            f"its password must be in {PASSWORD}"
        )


class _Payload(NamedTuple):
    """A statement in the form that the signers of model-signing take."""

    statement: Any


def sign_statement(signer: Signer, predicate_type: str, subject: Mapping[str, str], predicate: Statement) -> bytes:
    """Sign an in-toto statement and return a Sigstore bundle in JSON. subject: the sha256 of each subject by its name.

    Numbers in the predicate become doubles, so integers above 2^53 must be text. Raises InputError if signing fails.
    """
    with explained(signer.explain):
        config = signer.config()
        attestation = need("in_toto_attestation.v1.statement", "sign")
        subjects = [
            attestation.ResourceDescriptor(name=name, digest={"sha256": digest}).pb for name, digest in subject.items()
        ]
        statement = attestation.Statement(subjects, predicate_type, predicate)
        statement.validate()
        with TemporaryDirectory() as folder:
            file = Path(folder) / "signature"
            config._signer.sign(_Payload(statement)).write(file)
            return file.read_bytes()


def read_signature(path: Path) -> bytes | None:
    """Return the content of a signature file, or None if there is none.

    Raises InputError if it is not a plain file, is too large, or cannot be read.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is not a plain file, so it cannot be a signature; get it again")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > LARGEST:
        raise InputError(f"{path} is too large for a signature; sign again")
    return content


def verified_statement(content: bytes, place: Path, trust: Trust) -> tuple[Statement, str]:
    """Return the in-toto statement in a signature, and a description of its signer.

    place: the file of the signature, for messages. Raises InputError unless the signature is valid and by `trust`.
    """
    verifying = need("model_signing.verifying", "sign")
    try:
        material = json.loads(content)["verificationMaterial"]
        kinds = next(kinds for name, kinds in MATERIAL.items() if material.get(name))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        raise InputError(f"{place} is damaged or is not a signature; get it again, or sign again") from None
    if trust.kind not in kinds:
        raise InputError(
            f"{place} was signed with a {kinds[0]}, which is needed to verify it, but {trust} is a {trust.kind}"
        )
    try:
        payload_type, payload = _verified(verifying, content, trust)
        statement = json.loads(payload)
        if payload_type != PAYLOAD or statement["_type"] != STATEMENT:
            raise ValueError("it holds no in-toto statement")
    except Exception as error:  # cryptography, sigstore and the network raise many types
        raise InputError(
            f"{place} cannot be verified as signed by {trust} ({one_line(error)}); do not use the files that it covers"
        ) from error
    return statement, _description(trust, material)


def _verified(verifying: Any, content: bytes, trust: Trust) -> tuple[str, bytes]:
    """Return the type and the payload of an envelope. Raises model-signing's errors if its signature is not valid."""
    config = verifying.Config()
    with TemporaryDirectory() as folder:
        pem, file = Path(folder) / "trust.pem", Path(folder) / "signature"
        pem.write_bytes(trust.pem)
        file.write_bytes(content)
        if trust.kind == "key":
            config.use_elliptic_key_verifier(public_key=pem)
        elif trust.kind == "certificate":
            config.use_certificate_verifier(certificate_chain=[pem])
        else:
            config.use_sigstore_verifier(identity=trust.name, oidc_issuer=trust.issuer)
        reader = verifying.sigstore if trust.kind == "identity" else verifying.sigstore_pb
        verified: tuple[str, bytes] = config._verifier._verify_signed_content(reader.Signature.read(file))
    return verified


def _description(trust: Trust, material: Any) -> str:
    """Return a description of the signer. A key is named by the digest that model-signing calls its hint."""
    if trust.kind == "identity":
        return f"{trust.name} ({trust.issuer})"
    if trust.kind == "certificate":
        x509 = need("cryptography.x509", "sign")
        leaf = x509.load_der_x509_certificate(
            b64decode(material["x509CertificateChain"]["certificates"][0]["rawBytes"])
        )
        return f"{leaf.subject.rfc4514_string()} (certified by {leaf.issuer.rfc4514_string()})"
    keys = need("cryptography.hazmat.primitives.serialization", "sign")
    public = keys.load_pem_public_key(trust.pem)
    pem = public.public_bytes(keys.Encoding.PEM, keys.PublicFormat.SubjectPublicKeyInfo)
    return f"key {sha256(pem).hexdigest()[:16]}"
