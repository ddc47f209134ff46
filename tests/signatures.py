"""Keys, certificates and signed bundles for tests, and what an attacker does to them."""

import base64
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from served import BUNDLE

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.signing.envelope import Signer
from mpdsgr_deploy.signing.signed_bundle import sign_bundle
from mpdsgr_deploy.signing.trust import Trust, parse_trust
from mpdsgr_deploy.validation.report import Report
from mpdsgr_deploy.validation.rows import Reason, Row


class Keys(NamedTuple):
    """PEM files of one signer."""

    private: Path
    public: Path

    @property
    def signer(self) -> Signer:
        return Signer(self.private)

    @property
    def trust(self) -> Trust:
        return parse_trust(str(self.public))


def pem(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def new_keys(folder: Path, name: str, password: bytes | None = None) -> Keys:
    key = ec.generate_private_key(ec.SECP256R1())
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub")
    keys.private.write_bytes(pem(key, password))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    keys.public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    return keys


def certified(keys: Keys, folder: Path, subject: str = "ci@example.com") -> tuple[Path, Path]:
    """A certificate for a signer's key, and that of the authority which gave it."""
    authority, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    own = serialization.load_pem_public_key(keys.public.read_bytes())
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("Our CA", subject)]
    files = []
    for name, public, is_authority in ((names[1], own, False), (names[0], authority.public_key(), True)):
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        builder = (
            x509.CertificateBuilder(names[0], name, public, x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True, key_cert_sign=is_authority, crl_sign=False, decipher_only=False, **usage
                ),
                critical=True,
            )
        )
        file = folder / ("authority.crt" if is_authority else "signer.crt")
        file.write_bytes(builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        files.append(file)
    return files[0], files[1]


def signed_bundle(out: Path, keys: Keys, source: Path = BUNDLE) -> Path:
    shutil.copytree(source, out)
    sign_bundle(out, keys.signer)
    return out


def report_of(bundle: Path, out: Path, **fields: Any) -> Path:
    """A report directory on `bundle` with counts that nobody measured, and a page that nobody drew."""
    opened, precision = open_bundle(bundle), fields.get("precision", "fp32")
    right = np.arange(100) < 90
    rows = [Row.of("clean", "", right, eps=0.0, reference=right), Row.of("worst", "", right & False, eps=0.1)]
    values: dict[str, Any] = {
        "verdict": "pass",
        "reasons": [],
        "bundle": bundle.name,
        "bundle_sha256": opened.manifest.digest,
        "network": "vgg-small",
        "artefact_file": opened.manifest.variants[precision].file,
        "artefact_sha256": opened.model_sha256(precision),
        "backend": "onnxruntime-cpu",
        "precision": precision,
        "tier": "commit",
        "images": "the first 100 test images of digits",
        "images_sha256": "0" * 64,
        "seed": 2**62 + 1,
        "rows": rows,
        "parity": None,
        "health": [],
        "gate": Gate(),
        "seconds": 1.0,
        "provenance": {},
    }
    report = Report.model_validate(values | fields)
    if report.verdict == "fail" and not report.reasons:
        report = report.model_copy(update={"reasons": [Reason(text="too low", condition="worst")]})
    out.mkdir(exist_ok=True)
    (out / "report.json").write_text(report.model_dump_json())
    (out / "report.html").write_text("<p>90 of 100</p>")
    return out


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document that holds no others."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inside is None or not value:
        yield path
    for key, item in inside or ():
        yield from leaves(item, (*path, key))


def changed(document: Any, path: tuple[Any, ...]) -> Any:
    """A copy of a JSON document with another value at a place."""
    if not path:
        return {str: "0" + str(document), bool: not document}.get(type(document), 7)
    copy = document.copy()
    copy[path[0]] = changed(document[path[0]], path[1:])
    return copy


def payload(signature: Path) -> Any:
    """The statement in a signature."""
    return json.loads(base64.b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))


def with_payload(signature: bytes, statement: Any) -> bytes:
    """The signature with another statement in it."""
    envelope = json.loads(signature)
    envelope["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(envelope).encode()


def stock(*arguments: object) -> str:
    """What the command of the package model-signing prints, here in this process."""
    from model_signing._cli import main

    return CliRunner().invoke(main, [*map(str, arguments)]).output
