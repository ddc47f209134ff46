"""A verdict that travels: in-toto's own parsers read it, and a deployment that demands it gets no other bundle."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import yaml
from asgi import Client, started
from conftest import assert_input_error, mpdsgr_here
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf import json_format
from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
from served import BUNDLE
from signatures import Keys, changed, leaves, new_keys, payload, report_of, signed_bundle, with_payload

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.demand import demand_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.refusals import Refused
from mpdsgr_deploy.serving.settings import ServerSettings, TrustSettings, load_settings
from mpdsgr_deploy.signing.verdict import place_of_verdict
from mpdsgr_deploy.validation.attestation import VERDICT, sign_report, verify_report


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("keys"), "ci")


@pytest.fixture(scope="module")
def released(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that passed tier release, whose signer signed that too; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("released")
    place = Path(shutil.copytree(BUNDLE, folder / "digits"))
    report = report_of(place, folder / "report", tier="release")
    done = mpdsgr_here("sign", place, report, "--key", keys.private, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["written"]) == 3
    return place


@pytest.fixture
def report(keys: Keys, tmp_path: Path) -> Path:
    """A signed report."""
    out = report_of(BUNDLE, tmp_path / "report")
    sign_report(out, keys.signer)
    return out


def trusting(keys: Keys, tier: str = "") -> ServerSettings:
    return ServerSettings(trust=TrustSettings(require_signature=str(keys.public), require_verdict=tier))


class TestTheStatement:
    def test_is_one_of_intoto_about_the_bundle(self, report: Path) -> None:
        statement = payload(report / VERDICT)
        parsed = json_format.ParseDict(statement, statement_pb2.Statement())
        Statement.copy_from_pb(parsed).validate()
        assert parsed.predicate_type == "https://in-toto.io/attestation/test-result/v0.1"
        assert parsed.subject[0].digest["sha256"] == open_bundle(BUNDLE).manifest.digest
        result = json_format.ParseDict(statement["predicate"], test_result_pb2.TestResult(), ignore_unknown_fields=True)
        assert (result.result, list(result.passed_tests), list(result.failed_tests)) == (
            "PASSED",
            ["clean", "worst"],
            [],
        )
        assert result.configuration[0].digest["sha256"] == "0" * 64

    def test_is_verified_by_another_implementation_of_the_envelope(self, report: Path, keys: Keys) -> None:
        envelope = json.loads((report / VERDICT).read_bytes())["dsseEnvelope"]
        key = SSlibKey.from_crypto(load_pem_public_key(keys.public.read_bytes()))
        envelope["signatures"][0]["keyid"] = key.keyid  # a hint, which nothing signs
        assert Envelope.from_dict(envelope).verify([key], 1) == {key.keyid: key}

    def test_says_what_the_report_says(self, report: Path, keys: Keys) -> None:
        verdict, signer = verify_report(report, keys.trust)
        assert signer.startswith("key ")
        assert (verdict.verdict, verdict.tier, verdict.precision, verdict.seed) == (
            "pass",
            "commit",
            "fp32",
            str(2**62 + 1),
        )
        assert verdict.counts() == {"clean": "90/100", "worst": "0/100"}
        assert verdict.files.keys() == {"report.json", "report.html"}

    def test_of_a_failure_names_what_failed(self, tmp_path: Path, keys: Keys) -> None:
        out = report_of(BUNDLE, tmp_path / "report", verdict="fail")
        sign_report(out, keys.signer)
        predicate = payload(out / VERDICT)["predicate"]
        assert (predicate["result"], predicate["failedTests"]) == ("FAILED", ["worst"])

    def test_is_not_made_of_what_proves_nothing(self, tmp_path: Path, keys: Keys) -> None:
        out = report_of(BUNDLE, tmp_path / "report", verdict="invalid")
        assert_input_error(mpdsgr_here("sign", out, "--key", keys.private), "invalid")
        report_of(BUNDLE, out, bundle_sha256=None)
        assert_input_error(mpdsgr_here("sign", out, "--key", keys.private), "validate again")


class TestTamperingWithAReport:
    def test_in_any_file(self, report: Path, keys: Keys) -> None:
        files = [path for path in report.iterdir() if path.name != VERDICT]
        for file in files:
            content = file.read_bytes()
            for change in (lambda f, c: f.write_bytes(c.replace(b"0", b"1")), lambda f, _: f.unlink()):
                change(file, content)
                with pytest.raises(InputError, match=f"{file.name} has changed since it was signed|no report.json"):
                    verify_report(report, keys.trust)
            file.write_bytes(content)
        verify_report(report, keys.trust)
        (report / "evil.html").touch()
        with pytest.raises(InputError, match=r"evil\.html"):
            verify_report(report, keys.trust)

    def test_in_any_field_that_is_signed(self, report: Path, keys: Keys) -> None:
        signature, statement = (report / VERDICT).read_bytes(), payload(report / VERDICT)
        places = list(leaves(statement))
        assert len(places) > 40
        for path in places:
            (report / VERDICT).write_bytes(with_payload(signature, changed(statement, path)))
            with pytest.raises(InputError, match="cannot be verified as signed by"):
                verify_report(report, keys.trust)

    def test_or_signing_it_as_another(self, report: Path, keys: Keys, tmp_path: Path) -> None:
        stranger = new_keys(tmp_path, "stranger")
        sign_report(report, stranger.signer)
        assert_input_error(mpdsgr_here("verify", report, "--key", keys.public), "cannot be verified")
        assert mpdsgr_here("verify", report, "--key", stranger.public).returncode == 0
        assert_input_error(mpdsgr_here("verify", report), "--key")
        (report / VERDICT).unlink()
        assert_input_error(mpdsgr_here("verify", report, "--key", keys.public), "is not signed")

    def test_or_taking_a_bundles_signature_for_a_verdict(self, report: Path, released: Path, keys: Keys) -> None:
        shutil.copy(released / "model.sig", report / VERDICT)
        with pytest.raises(InputError, match="holds no verdict"):
            verify_report(report, keys.trust)


class TestDemands:
    @pytest.mark.parametrize("tier", ["commit", "release"])
    def test_a_bundle_that_passed_is_served(self, released: Path, keys: Keys, tier: str) -> None:
        demand = demand_of(str(keys.public), tier)
        vouched = demand.verdict(demand.open(released), "fp32")
        assert vouched
        assert vouched.verdict.tier == "release"

    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ("none", "carries no signed verdict"),
            ("another precision", "on other files"),
            ("easier", "passed only tier commit"),
            ("failed", "did not pass"),
            ("another bundle", "on other files"),
            ("another signer", "cannot be verified"),
        ],
    )
    def test_one_that_did_not_is_refused(self, how: str, expected: str, keys: Keys, tmp_path: Path) -> None:
        place = signed_bundle(tmp_path / "digits", keys)
        fields = {
            "easier": {"tier": "commit"},
            "failed": {"verdict": "fail", "tier": "paper"},
            "another bundle": {"bundle_sha256": "0" * 64},
            "another precision": {"precision": "int8"},
        }
        report = report_of(place, tmp_path / "report", **{"tier": "release", **fields.get(how, {})})
        signer = new_keys(tmp_path, "stranger") if how == "another signer" else keys
        _, content = sign_report(report, signer.signer)
        if how != "none":
            place_of_verdict(place, "fp32").parent.mkdir()
            place_of_verdict(place, "fp32").write_bytes(content)
        demand = demand_of(str(keys.public), "release")
        with pytest.raises(InputError, match=expected):
            demand.verdict(demand.open(place), "fp32")
        undemanding = demand._replace(tier=None)
        vouched = undemanding.verdict(undemanding.open(place), "fp32")
        assert (vouched is not None) == (how in ("easier", "failed"))

    def test_a_verdict_needs_a_signer_and_a_tier_that_exists(self, keys: Keys) -> None:
        with pytest.raises(InputError, match="--require-signature"):
            demand_of("", "release")
        with pytest.raises(InputError, match="unknown tier"):
            demand_of(str(keys.public), "rellease")

    def test_a_report_on_another_bundle_is_not_signed_into_this_one(
        self, released: Path, keys: Keys, tmp_path: Path
    ) -> None:
        report = report_of(released, tmp_path / "report", bundle_sha256="0" * 64)
        done = mpdsgr_here("sign", released, report, "--key", keys.private)
        assert_input_error(done, "is the report of another bundle")


class TestServing:
    def test_shows_who_signed_and_the_verdict(self, released: Path, keys: Keys) -> None:
        async def test() -> None:
            async with started(released, settings=trusting(keys, "release")) as server:
                client = Client(server)
                (model,) = (await client.get("/status")).json()["models"]
                parameters = (await client.get("/v2/models/digits/config")).json()["parameters"]
            line = "pass at tier release, fp32 on onnxruntime-cpu, the first 100 test images of digits"
            verdict = {"line": line, "correct": {"clean": "90/100", "worst": "0/100"}}
            assert model["signature"] == {"signer": parameters["signed_by"]["string_value"], "verdict": verdict}
            assert model["validation"] is None
            assert parameters["signed_by"]["string_value"].startswith("key ")
            assert parameters["signed_verdict"]["string_value"] == line

        asyncio.run(test())

    def test_a_replacement_that_is_not_signed_leaves_the_old_one_serving(
        self, released: Path, keys: Keys, tmp_path: Path
    ) -> None:
        place = Path(shutil.copytree(released, tmp_path / "digits"))

        async def test() -> None:
            async with started(place, settings=trusting(keys)) as server:
                before = server.repository.model("digits")
                (place / "model.sig").unlink()
                with pytest.raises(Refused, match="is not signed"):
                    await server.repository.load("digits")
                manifest = json.loads((place / "manifest.json").read_text())
                (place / "manifest.json").write_text(json.dumps({**manifest, "digest": "other"}))
                await server.repository.reload_changed()
                assert server.repository.model("digits") is before
                assert "is not signed" in server.repository.entry("digits").reason

        asyncio.run(test())

    def test_nothing_unsigned_starts(self, keys: Keys) -> None:
        async def test() -> None:
            async with started(BUNDLE, settings=trusting(keys)):
                pytest.fail("it serves")

        with pytest.raises(InputError, match="is not signed"):
            asyncio.run(test())

    def test_the_settings_file_names_a_key_beside_it_and_options_come_first(self, keys: Keys, tmp_path: Path) -> None:
        shutil.copy(keys.public, tmp_path / "ci.pub")
        (tmp_path / "settings.toml").write_text('[trust]\nrequire_signature = "ci.pub"\nrequire_verdict = "release"\n')
        settings = load_settings(tmp_path / "settings.toml")
        assert settings.trust.demand().tier == "release"
        assert settings.trust.require_signature == str(tmp_path / "ci.pub")
        assert settings.demanding(str(keys.public), "paper").trust.demand() == demand_of(str(keys.public), "paper")
        assert settings.demanding(None, None) == settings
        shipped = load_settings(Path(__file__).parent.parent / "serve" / "settings.toml")
        assert shipped.trust.demand() == demand_of("", "")


class TestDeploying:
    def test_kserve_demands_the_same_of_our_server(self, released: Path, keys: Keys, tmp_path: Path) -> None:
        where = ["--out", tmp_path / "out", "--storage-uri", "pvc://bundles", "--runtime", "mpdsgr", "--image", "mine"]
        demand = ["--require-signature", keys.public, "--require-verdict", "release"]
        done = mpdsgr_here("deploy", "kserve", released, *where, *demand)
        assert done.returncode == 0, done.stderr
        read = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "out").glob("*.yaml")}
        assert read["mpdsgr-trust"]["data"]["trust.pem"] == keys.public.read_text()
        predictor = read["digits"]["spec"]["predictor"]
        (container,) = predictor["containers"]
        key = "--require-signature=/etc/mpdsgr-trust/trust.pem"
        assert container["args"][-2:] == [key, "--require-verdict=release"]
        assert container["volumeMounts"][-1]["mountPath"] == "/etc/mpdsgr-trust"
        assert predictor["volumes"][-1]["configMap"]["name"] == "mpdsgr-trust"

    def test_ray_demands_the_same_of_every_replica(
        self, released: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(keys.public.parent)
        demand = ["--require-signature", keys.public.name, "--require-verdict", "release"]
        done = mpdsgr_here("deploy", "ray", released, "--out", tmp_path / "out", *demand)
        assert done.returncode == 0, done.stderr
        arguments = yaml.safe_load((tmp_path / "out" / "serve.yaml").read_text())["applications"][0]["args"]
        assert arguments["settings"]["trust"] == {"require_signature": str(keys.public), "require_verdict": "release"}

    def test_triton_gets_no_bundle_that_did_not_pass(self, released: Path, keys: Keys, tmp_path: Path) -> None:
        demand = ["--require-signature", keys.public, "--require-verdict"]
        done = mpdsgr_here("deploy", "triton", released, "--out", tmp_path / "out", *demand, "paper")
        assert_input_error(done, "passed only tier release", "--tier paper")
        done = mpdsgr_here("deploy", "triton", released, "--out", tmp_path / "out", *demand, "release")
        assert done.returncode == 0, done.stderr
