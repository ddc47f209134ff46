"""The verdict on a real bundle: reports that add up, and exit codes."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import mpdsgr, perturbed
from scipy.stats import binomtest

from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.health.check_registry import CHECKS
from mpdsgr_deploy.validation.proportions import mcnemar, wilson

LOOSE = Gate(max_drop=0.35)  # what 30 images can decide


@pytest.fixture(scope="module")
def report(bundle: Bundle):
    return validate(Target(bundle))


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (480, 497), (1, 1)])
def test_wilson_against_scipy(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (5, 5), (12, 3), (400, 350)])
def test_mcnemar_against_scipy(worse: int, better: int) -> None:
    expected = binomtest(worse, worse + better).pvalue if worse + better else 1.0
    assert mcnemar(worse, better) == pytest.approx(expected, rel=1e-9)


def test_a_healthy_bundle_passes_and_the_report_adds_up(report, bundle: Bundle) -> None:
    assert report.verdict == "pass", report.reasons
    rows = {row.name: row for row in report.rows}
    sweep = ["strong triangle:0.25", "strong triangle:2.5", "strong rectangular:1", "strong adaptive"]
    attacks = ["fgsm", "bim", "pgd", "pgd-strong", *sweep, "mpd-apgd", "square"]
    assert list(rows) == ["clean", "gaussian", "uniform", *attacks, "worst"]
    assert all(row.n == 100 for row in report.rows)
    assert rows["clean"].reference.accuracy > rows["fgsm"].reference.accuracy >= rows["worst"].reference.accuracy
    assert rows["clean"].artefact.correct == bundle.manifest.variants["fp32"].accuracy.correct
    everything = np.ones(100, bool)
    for row in report.rows:
        scores = (row.reference, row.artefact)
        bits = [np.unpackbits(np.frombuffer(bytes.fromhex(s.bitmap), np.uint8))[:100].astype(bool) for s in scores]
        assert [int(b.sum()) for b in bits] == [row.reference.correct, row.artefact.correct]
        assert int((bits[0] & ~bits[1]).sum()) == row.flips.newly_wrong
        everything &= bits[1] if row.eps is not None else True
    assert rows["worst"].artefact.correct == everything.sum()
    made = {check.number for check in report.health}
    assert {CHECKS[number].needs for number in CHECKS.keys() - made} == {("rebuilt",)}  # nobody asked to export again
    assert all(check.passed for check in report.health)
    assert report.parity.holds
    assert report.artefact_sha256 == sha256(bundle.variant("fp32"))
    assert rows["fgsm"].evaluations == rows["clean"].artefact.accuracy  # one gradient for each image not wrong anyway


def test_white_box_through_the_artefact_is_white_box_through_torch(report) -> None:
    """The same attacks, on torch when exported and on the attack graph now: nearly every verdict is the same."""
    for row in report.rows:
        few = 10 if row.name in ("mpd-apgd", "worst") else 1  # adaptive steps part at the first flipped spike
        assert row.flips.newly_wrong + row.flips.newly_right <= few, row.name
        low, high = row.reference.interval
        assert low <= row.artefact.accuracy <= high


def test_figures_of_the_report_come_from_the_probe(report) -> None:
    assert {curve.attack for curve in report.curves} == {"fgsm", "pgd-strong"}
    for curve in report.curves:
        assert [point.eps for point in curve.points] == sorted(point.eps for point in curve.points)
        assert curve.points[0].eps == 0
        assert all(point.n == TIERS["commit"].probe for point in curve.points)
    assert report.examples
    assert all(example.clean == example.label != example.attacked for example in report.examples)


def test_other_precisions_are_attacked_through_their_own_weights(precise: Bundle) -> None:
    found = validate(Target(precise, precision="int8"))
    assert found.verdict == "pass", found.reasons
    names = [row.name for row in found.rows]
    assert "transfer fp32" in names  # the minimum of transfer, white-box and queries is what counts
    assert {flips.precision for flips in found.variants} == {"fp16", "int8", "fp8"}
    assert found.artefact_sha256 == precise.model_sha256("int8")


def test_tier_release_attacks_longer_and_the_gate_says_what_it_takes(bundle: Bundle) -> None:
    gate = Gate(tier="release", max_drop=0.4)
    found = validate(Target(bundle), gate=gate, limit=25)
    (longer,) = [row for row in found.rows if row.name == "mpd-apgd"]
    assert "rounds of 100, 100, 100, 300, 300, 900, 900, 900" in longer.settings
    with pytest.raises(InputError, match="100 images cannot decide this gate, which needs 500"):
        validate(Target(bundle), gate=Gate(tier="release", max_drop=0.02))


def test_an_evaluation_stops_once_the_gate_cannot_be_passed(bundle: Bundle) -> None:
    recipe = bundle.manifest.recipe.validation.model_copy(update={"batch_size": 10})
    manifest = bundle.manifest.model_copy(
        update={"recipe": bundle.manifest.recipe.model_copy(update={"validation": recipe})}
    )
    found = validate(Target(Bundle(bundle.path, manifest)), gate=Gate(floors={"fgsm": 0.95}))
    assert found.verdict == "fail"
    assert "floor 95.00% cannot be reached" in found.stopped.why
    assert found.stopped.after == "fgsm"
    assert [reason.condition for reason in found.reasons] == ["fgsm"]
    assert [row.at_most for row in found.rows] == [False, False, False, True, True]
    assert [row.name for row in found.rows] == ["clean", "gaussian", "uniform", "fgsm", "worst"]
    assert found.rows[3].n < 100


def test_exit_code_0_and_1(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text("max_drop = 0.35")
    arguments = ["--limit", 30, "--report", tmp_path / "r", "--gate", tmp_path / "gate.toml", "--no-rebuild"]
    done = mpdsgr("validate", bundle.path, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["n"] == 30
    assert not (tmp_path / "r" / ".progress").exists()
    (tmp_path / "gate.toml").write_text("max_drop = 0.35\nfloors = { clean = 1.0, worst = 1.0 }")
    done = mpdsgr("validate", bundle.path, *arguments)
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout
    assert "below the floor" in done.stdout
    suite = ElementTree.parse(tmp_path / "r" / "junit.xml").getroot()
    assert int(suite.get("failures")) >= 1


def test_a_wrong_artefact_with_consistent_hashes_fails_the_gate(bundle: Bundle, tmp_path: Path) -> None:
    """Weights of the artefact perturbed, golden logits made to match: only the reference can tell."""
    found = validate(Target(open_bundle(perturbed(bundle, tmp_path / "bundle"))))
    assert found.verdict == "fail"
    assert any("answers differ from those of the exported network" in reason.text for reason in found.reasons)


def test_a_masked_gradient_is_an_invalid_evaluation(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3: an artefact whose gradient is zero for most images must not be certified as robust."""
    real = GraphAttacker.__call__

    def masked(self: GraphAttacker, x: np.ndarray, y: np.ndarray) -> Gradient:
        found = real(self, x, y)
        return found._replace(gradient=np.where(np.arange(len(x))[:, None, None, None] % 3 == 0, found.gradient, 0))

    monkeypatch.setattr(GraphAttacker, "__call__", masked)
    found = validate(Target(bundle), gate=LOOSE, limit=30)
    assert found.verdict == "invalid"
    assert any(reason.check == 7 for reason in found.reasons)


def test_data_of_another_kind_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shuffled = Bundle(bundle.path, bundle.manifest.model_copy(update={"labels": bundle.manifest.labels[::-1]}))
    with pytest.raises(InputError, match="does not fit the network"):
        validate(Target(shuffled), root=str(tmp_path))
    with pytest.raises(InputError, match="download=True"):
        validate(Target(bundle), data="cifar10", root=str(tmp_path))
    with pytest.raises(InputError, match="the bundle carries 100 test images, not 101"):
        validate(Target(bundle), limit=101)
