"""Who signed a bundle: the stock tools agree with ours, and whatever else was done to it is refused unread."""

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import resealed
from served import BUNDLE
from signatures import Keys, certified, changed, leaves, payload, stock, with_payload
from signed_fixtures import copy, keys, refused, signed, stranger

from mpdsgr_deploy import bundle as bundle_module
from mpdsgr_deploy.bundle import Prepared, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.signing.envelope import LARGEST, Signer
from mpdsgr_deploy.signing.signed_bundle import SIGNATURE, VERDICTS, sign_bundle
from mpdsgr_deploy.signing.trust import parse_trust


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused in this test is refused before the manifest is read, and so before any network is."""

    def read(*arguments: object) -> None:
        pytest.fail("the manifest was read")

    monkeypatch.setattr(bundle_module, "_read_manifest", read)


class TestTheStockTool:
    def test_verifies_what_we_sign_with_a_key(self, signed: Path, keys: Keys) -> None:
        command = [sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / SIGNATURE]
        done = subprocess.run([*map(str, command), "--public_key", keys.public], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_signs_what_we_verify(self, copy: Path, keys: Keys) -> None:
        (copy / SIGNATURE).unlink()
        told = stock("sign", "key", copy, "--private_key", keys.private, "--signature", copy / SIGNATURE)
        assert "succeeded" in told
        assert open_bundle(copy, keys.trust).signed

    def test_agrees_on_certificates_both_ways(self, copy: Path, keys: Keys, tmp_path: Path) -> None:
        certificate, authority = certified(keys, tmp_path)
        sign_bundle(copy, Signer(keys.private, certificate))
        verify = ("verify", "certificate", copy, "--certificate_chain", authority, "--signature", copy / SIGNATURE)
        assert "succeeded" in stock(*verify)
        opened = open_bundle(copy, parse_trust(str(authority)))
        assert opened.signed
        assert opened.signed.signer == "CN=ci@example.com (certified by CN=Our CA)"
        sign = ("sign", "certificate", copy, "--private_key", keys.private, "--signing_certificate", certificate)
        told = stock(*sign, "--certificate_chain", authority, "--signature", copy / SIGNATURE)
        assert "succeeded" in told
        assert open_bundle(copy, parse_trust(str(authority))).signed
        other = tmp_path / "other"
        other.mkdir()
        refused(copy, parse_trust(str(certified(keys, other)[1])), "cannot be verified")
        refused(copy, keys.trust, "signed with a certificate")

    def test_allows_what_we_leave_out(self, copy: Path, keys: Keys) -> None:
        """Verdicts and the lock of a build come and go; so do git's own files."""
        (copy / VERDICTS).mkdir()
        (copy / VERDICTS / "fp32.sig").write_text("later")
        (copy / ".lock").touch()
        (copy / ".gitattributes").touch()
        verify = ("verify", "key", copy, "--public_key", keys.public, "--signature", copy / SIGNATURE)
        assert "succeeded" in stock(*verify)
        assert open_bundle(copy, keys.trust).signed


@pytest.mark.usefixtures("unread")
class TestTampering:
    def test_with_any_file(self, copy: Path, keys: Keys) -> None:
        files = [path for path in copy.rglob("*") if path.is_file() and path.name != SIGNATURE]
        assert len(files) > 8
        for file in files:
            content = file.read_bytes()
            flipped = bytearray(content)
            flipped[len(flipped) // 2] ^= 1
            file.write_bytes(flipped)
            refused(copy, keys.trust, f"{file.name} is not the file that was signed")
            file.unlink()
            refused(copy, keys.trust, f"lacks {file.name}|it has no manifest.json")
            file.write_bytes(content)

    def test_with_any_field_of_the_manifest_as_somebody_does_who_makes_the_digests_fit(
        self, copy: Path, keys: Keys
    ) -> None:
        manifest = json.loads((copy / "manifest.json").read_bytes())
        places = [path for key, value in manifest.items() for path in list(leaves(value, (key,)))[:3]]
        assert len(places) > 30
        for path in places:
            (copy / "manifest.json").write_text(json.dumps(changed(manifest, path)))
            refused(copy, keys.trust, r"manifest.json is not the file that was signed")

    def test_with_any_field_of_the_signature(self, copy: Path, keys: Keys) -> None:
        place, content = copy / SIGNATURE, (copy / SIGNATURE).read_bytes()
        envelope = json.loads(content)
        for path in leaves(envelope):
            if path[-1] in ("keyid", "tlogEntries"):  # of no meaning where a key signs
                continue
            place.write_text(json.dumps(changed(envelope, path)))
            refused(copy, keys.trust)
        statement = payload(copy / SIGNATURE) if place.write_bytes(content) else None
        for path in leaves(statement):
            place.write_bytes(with_payload(content, changed(statement, path)))
            refused(copy, keys.trust, "cannot be verified as signed by")

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"verificationMaterial": 3}', b"[" * 10_000])
    def test_with_a_signature_that_is_none(self, copy: Path, keys: Keys, content: bytes) -> None:
        (copy / SIGNATURE).write_bytes(content)
        refused(copy, keys.trust, "is not a signature")

    def test_another_key_and_a_signature_that_is_missing_or_endless(
        self, copy: Path, keys: Keys, stranger: Keys
    ) -> None:
        refused(copy, stranger.trust, "cannot be verified as signed by")
        with (copy / SIGNATURE).open("r+b") as file:
            file.truncate(LARGEST + 1)
        refused(copy, keys.trust, "too large")
        (copy / SIGNATURE).unlink()
        refused(copy, keys.trust, "is not signed")

    def test_the_signature_of_another_bundle_by_the_same_signer(
        self, copy: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = shutil.copytree(BUNDLE, tmp_path / "other")
        with np.load(other / "golden.npz") as arrays:
            golden = {name: array + 1 for name, array in arrays.items()}
        np.savez(other / "golden.npz", **golden)
        resealed(Path(other))
        sign_bundle(Path(other), keys.signer)
        shutil.copy(Path(other) / SIGNATURE, copy / SIGNATURE)
        refused(copy, keys.trust, "is not the file that was signed")

    def test_files_that_were_added_and_links(self, copy: Path, keys: Keys, tmp_path: Path) -> None:
        added = copy / "engines" / "evil.plan"
        added.parent.mkdir()
        added.write_bytes(b"code")
        refused(copy, keys.trust, r"holds engines/evil.plan, which model.sig does not cover")
        added.unlink()
        os.mkfifo(added)
        refused(copy, keys.trust, "plain file")
        shutil.rmtree(added.parent)
        added.parent.symlink_to(tmp_path)
        refused(copy, keys.trust, "link")
        added.parent.unlink()
        same = Path(shutil.copy(copy / "golden.npz", tmp_path / "golden.npz"))
        (copy / "golden.npz").unlink()
        (copy / "golden.npz").symlink_to(same)
        refused(copy, keys.trust, "golden.npz, which is a link")
        signature = Path(shutil.copy(copy / SIGNATURE, tmp_path))
        (copy / SIGNATURE).unlink()
        (copy / SIGNATURE).symlink_to(signature)
        refused(copy, keys.trust, "plain file")

    def test_a_signature_that_leaves_files_out_vouches_for_none_of_them(self, copy: Path, keys: Keys) -> None:
        (copy / SIGNATURE).unlink()
        sign = ("sign", "key", copy, "--private_key", keys.private, "--signature", copy / SIGNATURE)
        assert "succeeded" in stock(*sign, "--ignore-paths", copy / "manifest.json")
        refused(copy, keys.trust, "manifest.json, which model.sig does not cover")


class TestThePrivateCopy:
    def test_is_what_is_loaded_whatever_happens_to_the_bundle(self, copy: Path, keys: Keys) -> None:
        opened = open_bundle(copy, keys.trust)
        for file in copy.iterdir():
            file.write_bytes(b"replaced")
        inputs, logits = opened.golden()
        with open_predictor(opened) as predictor:
            np.testing.assert_allclose(predictor(inputs), logits, atol=1e-5)
        assert opened.path == copy
        assert not opened.variant("fp32").is_relative_to(copy)
        assert opened.root.stat().st_mode & 0o077 == 0

    def test_goes_with_its_bundle(self, copy: Path, keys: Keys) -> None:
        opened = open_bundle(copy, keys.trust)
        root = opened.root
        assert root.is_dir()
        del opened
        gc.collect()
        assert not root.exists()

    def test_is_made_and_verified_anew_where_a_bundle_is_sent(self, copy: Path, keys: Keys, stranger: Keys) -> None:
        opened = open_bundle(copy, keys.trust)
        sent = pickle.dumps(opened)
        received = pickle.loads(sent)
        assert received.root != opened.root
        assert received.variant("fp32").read_bytes() == opened.variant("fp32").read_bytes()
        sign_bundle(copy, keys.signer)  # another signature of the same files: ECDSA draws a number
        with pytest.raises(InputError, match="replaced"):
            pickle.loads(sent)
        sign_bundle(copy, stranger.signer)
        with pytest.raises(InputError, match="cannot be verified"):
            pickle.loads(sent)


def test_building_into_a_signed_bundle_removes_its_signatures(copy: Path, keys: Keys) -> None:
    (copy / VERDICTS).mkdir()
    opened = open_bundle(copy)
    made = Prepared(backend="b", precision="fp32", model_sha256=opened.model_sha256("fp32"), machine={"cpu": "x"})
    opened.add(made, b"an engine")
    assert not (copy / SIGNATURE).exists()
    assert not (copy / VERDICTS).exists()
    sign_bundle(copy, keys.signer)
    assert open_bundle(copy, keys.trust).manifest.prepared[0].file


def test_an_exported_bundle_takes_the_place_of_a_signed_one(copy: Path) -> None:
    (copy / VERDICTS).mkdir()
    (copy / VERDICTS / "fp32.sig").touch()
    with bundle_module.staged(copy) as scratch:
        shutil.copytree(BUNDLE, scratch, dirs_exist_ok=True)
        (scratch / "manifest.json").unlink()
        fields = open_bundle(BUNDLE).manifest
        bundle_module.seal(
            scratch,
            copy,
            **{name: getattr(fields, name) for name in type(fields).model_fields if name not in ("files", "digest")},
        )
    assert not (copy / SIGNATURE).exists()
