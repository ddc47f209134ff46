"""Signing and verifying from the command line, from Python, without keys by Sigstore, and the keys themselves."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr_here
from served import BUNDLE
from signatures import Keys, new_keys
from signed_fixtures import copy, keys, refused, signed, stranger

import mpdsgr_deploy as mpd
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.signing.signed_bundle import SIGNATURE
from mpdsgr_deploy.signing.trust import Trust, parse_trust
from mpdsgr_deploy.validation import Target


class TestCommands:
    def test_sign_and_verify(self, copy: Path, keys: Keys, stranger: Keys) -> None:
        (copy / SIGNATURE).unlink()
        done = mpdsgr_here("sign", copy, "--key", keys.private)
        assert (done.returncode, done.stdout) == (0, f"{copy / SIGNATURE}\n"), done.stderr
        done = mpdsgr_here("verify", copy, "--key", keys.public, "--json")
        told = json.loads(done.stdout)
        assert told["checked"][0] == "signature"
        assert told["signer"].startswith("key ")
        assert_input_error(mpdsgr_here("verify", copy, "--key", stranger.public), "cannot be verified")
        assert_input_error(mpdsgr_here("verify", copy, "--key", keys.private), "private key", "-pubout")
        assert_input_error(mpdsgr_here("verify", copy, "--certificate", keys.public), "holds a key", "--key")
        assert_input_error(mpdsgr_here("verify", copy, "--identity", "me@example.com"), "--issuer")
        assert_input_error(mpdsgr_here("sign", copy), "--key FILE")
        assert_input_error(mpdsgr_here("sign", copy, "--key", keys.public), "cannot sign with")
        assert_input_error(mpdsgr_here("sign", copy.parent, "--key", keys.private), "neither a bundle")

    def test_a_key_with_a_password(self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        locked = new_keys(tmp_path, "locked", b"secret")
        assert_input_error(mpdsgr_here("sign", copy, "--key", locked.private), "MPDSGR_KEY_PASSWORD")
        monkeypatch.setenv("MPDSGR_KEY_PASSWORD", "secret")
        assert mpdsgr_here("sign", copy, "--key", locked.private).returncode == 0
        assert open_bundle(copy, locked.trust).signed

    def test_without_the_extra_it_says_what_to_install(
        self, copy: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("model_signing", "model_signing.signing", "model_signing.verifying"):
            monkeypatch.setitem(sys.modules, module, None)
        for command in (("sign", copy, "--key", keys.private), ("verify", copy, "--key", keys.public)):
            assert_input_error(mpdsgr_here(*command), "mpdsgr-deploy[sign]")

    @pytest.mark.parametrize("what", ["validate", "predict", "triton", "kserve", "ray", "gate file", "environment"])
    def test_whoever_reads_bundles_can_require_a_signature(
        self, what: str, keys: Keys, stranger: Keys, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        np.save("x.npy", np.zeros((2, 1, 8, 8), np.float32))
        options: dict[str, list[object]] = {
            "validate": ["--gate", "gate.toml", "--no-rebuild"],
            "gate file": ["--gate", "gate.toml", "--no-rebuild"],
            "kserve": ["--storage-uri", "s3://a/b"],
        }
        words = {"predict": ["predict"], "environment": ["predict"]}.get(what, ["deploy", what])
        words = ["validate"] if what in ("validate", "gate file") else words
        tail = ["x.npy"] if words == ["predict"] else []
        out = [] if words == ["predict"] else ["--report" if words == ["validate"] else "--out", tmp_path / "out"]

        def run(bundle: Path, key: Path) -> Any:
            required, rules = ["--require-signature", key], "least_images = 99999\n"
            Path("gate.toml").write_text(rules)
            if what == "gate file":
                Path("gate.toml").write_text(f'require_signature = "{key.name}"\n{rules}')
                (tmp_path / key.name).write_bytes(key.read_bytes())
                required = []
            elif what == "environment":
                monkeypatch.setenv("MPDSGR_REQUIRE_SIGNATURE", str(key))
                required = []
            return mpdsgr_here(*words, bundle, *tail, *out, *options.get(what, []), *required)

        assert_input_error(run(BUNDLE, keys.public), "is not signed")
        assert_input_error(run(signed, stranger.public), "cannot be verified")
        accepted = run(signed, keys.public)
        if words == [
            "validate"
        ]:  # the gate asks for more images than there are, which is found once the bundle is open
            assert_input_error(accepted, "the gate requires at least 99999 images")
        else:
            assert accepted.returncode == 0, accepted.stderr


class TestSigstore:
    """What happens without its servers; nothing here could reach them."""

    @pytest.fixture(autouse=True)
    def unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise ConnectionError("no route to Sigstore")

        monkeypatch.setattr("sigstore.models.ClientTrustConfig.production", fail)

    def test_nobody_signs(self, copy: Path) -> None:
        (copy / SIGNATURE).unlink()
        done = mpdsgr_here("sign", copy, "--sigstore")
        assert_input_error(done, "cannot sign with a Sigstore identity: no route to Sigstore")
        assert not (copy / SIGNATURE).exists()

    def test_nothing_is_believed(self, copy: Path) -> None:
        envelope = json.loads((copy / SIGNATURE).read_bytes())
        envelope["verificationMaterial"] = {"certificate": {"rawBytes": "AAAA"}}
        (copy / SIGNATURE).write_text(json.dumps(envelope))
        done = mpdsgr_here("verify", copy, "--identity", "me@example.com", "--issuer", "https://accounts.google.com")
        assert_input_error(done, "cannot be verified", "me@example.com at https://accounts.google.com", "no route")


class TestFromPython:
    def test_bundles_are_opened_and_validated_by_signature(self, signed: Path, keys: Keys, tmp_path: Path) -> None:
        assert mpd.open_bundle(signed, require_signature=str(keys.public)).signed
        with pytest.raises(InputError, match="is not signed"):
            mpd.open_bundle(BUNDLE, require_signature=str(keys.public))
        (tmp_path / "gate.toml").write_text(f'require_signature = "{keys.public}"\n')
        for unsigned in (BUNDLE, open_bundle(BUNDLE)):
            with pytest.raises(InputError, match="is not signed"):
                mpd.validate(unsigned, tmp_path / "report", gate=tmp_path / "gate.toml")

    def test_networks_to_attack_from_must_be_signed_as_well(self, signed: Path, keys: Keys, tmp_path: Path) -> None:
        target = Target(open_bundle(signed, keys.trust))
        for other, expected in ((BUNDLE, "is not signed"), (tmp_path, "cannot be signed")):
            with pytest.raises(InputError, match=expected), target.sources(other):
                pass


class TestKeys:
    def test_a_file_that_holds_none(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("ssh-rsa AAAA")
        for text, expected in ((tmp_path / "key", "neither a public key"), (tmp_path / "gone", "cannot read the key")):
            with pytest.raises(InputError, match=expected):
                parse_trust(str(text))

    def test_an_identity(self) -> None:
        workflow = "https://github.com/me/net/.github/workflows/ci.yml@refs/heads/main"
        issuer = "https://token.actions.githubusercontent.com"
        assert parse_trust(f"{workflow},{issuer}") == Trust("identity", workflow, issuer=issuer)

    def test_an_identity_is_verified_by_sigstore_alone(self, signed: Path) -> None:
        refused(signed, parse_trust("me@example.com,https://accounts.google.com"), "was signed with a key")
