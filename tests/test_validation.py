"""The verdict: statistics against scipy, health checks against planted faults, the gate."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import mpdsgr
from mpdsgr_deploy.validation.conditions import Condition, conditions, torch_attackers
from scipy.stats import binomtest

from mpdsgr_deploy.bundle import Bundle, Manifest, open_bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import sha256
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.protocols import Array, Differentiable, Gradient
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.validation import health, validate
from mpdsgr_deploy.validation.gate import Gate, load_gate
from mpdsgr_deploy.validation.rows import Row
from mpdsgr_deploy.validation.statistics import mcnemar, wilson


@pytest.fixture(scope="module")
def report(bundle: Bundle):
    return validate(bundle, backend="onnxruntime-cpu")


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
    attacks = ["fgsm", "bim", "pgd", "pgd-strong", "strong triangle:0.5", "strong rate"]
    assert list(rows) == ["clean", "gaussian", "uniform", *attacks, "worst"]
    assert all(row.n == 100 for row in report.rows)
    assert rows["clean"].reference.accuracy > rows["fgsm"].reference.accuracy >= rows["worst"].reference.accuracy
    accuracy = bundle.manifest.variants["fp32"].accuracy
    assert rows["clean"].artefact.correct == accuracy.correct
    for row in report.rows:
        bits = [
            np.unpackbits(np.frombuffer(bytes.fromhex(s.bitmap), np.uint8))[:100] for s in (row.reference, row.artefact)
        ]
        assert [int(b.sum()) for b in bits] == [row.reference.correct, row.artefact.correct]
        assert int((bits[0] > bits[1]).sum()) == row.flips.newly_wrong
    assert [check.number for check in report.health] == [1, 2, 7, 8, 9]
    assert report.parity.holds
    assert report.artefact_sha256 == sha256(bundle.variant("fp32"))


def test_the_same_seed_gives_the_same_report(report, bundle: Bundle) -> None:
    again = validate(bundle, backend="torch")  # the reference itself as artefact
    assert [row.reference for row in again.rows] == [row.reference for row in report.rows]
    assert all(row.reference == row.artefact for row in again.rows)


def test_conditions_do_not_depend_on_the_batch_size(bundle: Bundle) -> None:
    images = load_test(bundle.manifest.recipe.data)[:30]
    attack = bundle.manifest.recipe.attack
    target = torch_attackers(TorchModel.from_bundle(bundle), attack)
    one, other = (
        list(conditions(target, images.unit(), images.classes, attack, batch_size=size, seed=1)) for size in (30, 7)
    )
    for a, b in zip(one, other, strict=True):
        assert a[:3] == b[:3]
        assert np.mean(np.abs(a.images - b.images).max((1, 2, 3)) < 1e-6) > 0.9  # sign flips of tiny gradients apart


# Health checks: each is shown the fault it exists for, and what is sound beside it.


def test_check_1_flags_images_that_cheat() -> None:
    clean = np.full((2, 1, 2, 2), 0.5, np.float32)
    fine = Condition("a", "", 0.1, clean + np.float32(0.1))
    assert health.budget_faults(clean, fine) == []
    assert health.budget_faults(clean, Condition("noise", "", None, clean + 0.4)) == []
    for images, expected in (
        (clean + np.float32(0.1001), "more than eps"),
        (clean + np.float32(0.6), "leaves"),
        (clean * np.float32(np.nan), "non-finite"),
    ):
        (fault,) = health.budget_faults(clean, fine._replace(images=images))
        assert expected in fault
    assert not health.check_budget(["fault"], "rule").passed


def verdicts(**broken: list[int]) -> dict[str, np.ndarray]:
    found = {name: np.ones(200, bool) for name in ("uniform", "fgsm", "pgd", "pgd-strong")}
    for name, indices in broken.items():
        found[name.replace("_", "-")][indices] = False
    return found


def test_check_2_flags_a_stronger_attack_that_does_less() -> None:
    order = list(range(0, 100)), list(range(0, 120)), list(range(0, 150))
    assert health.check_order(verdicts(fgsm=order[0], pgd=order[1], pgd_strong=order[2])).passed
    assert health.check_order(verdicts(fgsm=order[0], pgd=[*range(3, 100)], pgd_strong=order[1])).passed  # chance
    masked = health.check_order(verdicts(fgsm=order[1], pgd=order[0], pgd_strong=order[2]))
    assert not masked.passed
    assert "fgsm breaks 20" in masked.saw


def test_check_3_flags_a_network_that_another_ones_gradient_breaks_better() -> None:
    sound = verdicts(pgd_strong=list(range(100))) | {"transfer": np.arange(200) >= 40}
    masked = verdicts(pgd_strong=list(range(10))) | {"transfer": np.arange(200) < 150}
    assert health.check_transfer(sound).passed
    assert not health.check_transfer(masked).passed
    assert "transfer breaks 50" in health.check_transfer(masked).saw


class Planted:
    """A Differentiable whose gradient is zero for some samples and not finite for others."""

    def __init__(self, zero: int, bad: int) -> None:
        self.zero, self.bad = zero, bad

    def __call__(self, x: Array, y: Array) -> Gradient:
        gradient = np.ones_like(x)
        gradient[: self.zero] = 0
        gradient[self.zero : self.zero + self.bad, 0, 0, 0] = np.nan
        return Gradient(np.zeros((len(x), 2)), np.zeros(len(x)), gradient)


@pytest.mark.parametrize(("zero", "bad", "passed"), [(0, 0, True), (5, 0, True), (6, 0, False), (0, 1, False)])
def test_check_7_flags_gradients_that_vanish_or_explode(zero: int, bad: int, passed: bool) -> None:
    monitor = health.GradientMonitor(Planted(zero, bad))
    assert not health.check_gradients(monitor).passed  # nothing asked yet
    x = np.zeros((100, 1, 2, 2), np.float32)
    assert np.array_equal(monitor(x, np.zeros(100)).logits, np.zeros((100, 2)))
    assert health.check_gradients(monitor).passed is passed


def test_check_8_flags_state_batch_dependence_and_a_process_that_disagrees(bundle: Bundle) -> None:
    x = load_test(bundle.manifest.recipe.data)[:64].unit()
    model = TorchModel.from_bundle(bundle)

    class Leaky:
        """Answers depend on the batch before."""

        last = 0.0

        def __call__(self, x: np.ndarray) -> np.ndarray:
            shift, self.last = self.last, float(x.mean())
            return model(x) + np.float32(shift)

    def batch_dependent(x: np.ndarray) -> np.ndarray:
        return model(x) - model(x).mean(0)

    assert health.check_function(model, model, x).passed
    assert "asked again" in health.check_function(Leaky(), model, x).saw
    assert "in two batches" in health.check_function(batch_dependent, batch_dependent, x).saw
    stranger = health.check_function(model, lambda x: model(x) * 2, x)
    assert not stranger.passed
    assert "in a fresh process" in stranger.saw

    class Counting:
        """One row of 32 drifts from call to call."""

        calls = 0

        def __call__(self, x: np.ndarray) -> np.ndarray:
            self.calls += 1
            return model(x) + np.eye(len(x), 10, dtype=np.float32)[:, :1] * np.float32(self.calls * 1e-3)

    assert "asked again" in health.check_function(Counting(), model, x).saw
    gone = health.fresh_process(bundle.path / "nowhere", "onnxruntime-cpu", "fp32")
    assert "it failed: error:" in health.check_function(model, gone, x).saw
    fresh = health.fresh_process(bundle.path, "onnxruntime-cpu", "fp32")
    assert compare(model(x[:5]), fresh(x[:5])).holds


def test_check_9_flags_an_empty_comparison() -> None:
    assert health.check_compared(1).passed
    assert not health.check_compared(0).passed
    assert not compare(np.zeros((0, 10), np.float32), np.zeros((0, 10), np.float32)).holds


# The gate.


def rows(reference: list[int], artefact: list[int]) -> list[Row]:
    arrays = np.array(reference, bool), np.array(artefact, bool)
    return [Row.of(name, "", *arrays) for name in ("clean", "worst")]


def test_gate_counts_paired_flips_not_percentages() -> None:
    swapped = rows([1] * 50 + [0] * 50, [0] * 2 + [1] * 48 + [1] * 2 + [0] * 48)
    assert swapped[0].reference.accuracy == swapped[0].artefact.accuracy
    assert Gate(max_newly_wrong=0.02).failures(swapped) == []
    assert len(Gate(max_newly_wrong=0.01).failures(swapped)) == 2
    assert Gate(max_newly_wrong=0.0).failures(rows([1, 0], [1, 1])) == []


def test_gate_floors() -> None:
    even = rows([1] * 80 + [0] * 20, [1] * 80 + [0] * 20)
    assert Gate(min_clean=0.8, min_attacked=0.8).failures(even) == []
    (failure,) = Gate(min_attacked=0.81).failures(even)
    assert failure.startswith("worst: accuracy 80.00%")


def test_gate_files(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text("min_clean = 0.5")
    assert load_gate(file) == Gate(min_clean=0.5)
    assert load_gate(None) == Gate()
    assert load_gate(Path(__file__).parent.parent / "export" / "gates" / "strict.toml").max_newly_wrong == 0
    for text, expected in (
        ("min_claen = 0.5", "unknown key 'min_claen'"),
        ("min_clean = 2", "min_clean"),
        ("=", "TOML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=expected):
            load_gate(file)
    with pytest.raises(InputError, match="cannot read"):
        load_gate(tmp_path / "no.toml")


# Exit codes of the command, on real bundles.


def test_exit_code_0_and_1(bundle: Bundle, tmp_path: Path) -> None:
    done = mpdsgr("validate", bundle.path, "--limit", 40, "--report", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["n"] == 40
    (tmp_path / "gate.toml").write_text("min_clean = 1.0\nmin_attacked = 1.0")
    arguments = ["--limit", 40, "--report", tmp_path / "r", "--gate", tmp_path / "gate.toml"]
    done = mpdsgr("validate", bundle.path, *arguments)
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout
    assert "below the floor" in done.stdout
    assert ElementTree.parse(tmp_path / "r" / "junit.xml").getroot().get("failures") == "2"  # clean and worst


def test_a_wrong_artefact_with_consistent_hashes_fails_the_gate(bundle: Bundle, tmp_path: Path) -> None:
    """Weights of the artefact perturbed, golden logits made to match: only comparing verdicts can tell."""
    import onnx
    from onnx import numpy_helper

    from mpdsgr_deploy.runtime import OnnxRuntime

    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    network = onnx.load(path / "model.fp32.onnx")
    (readout,) = (i for i in network.graph.initializer if i.name == "readout.weight")
    noise = np.random.default_rng(0).normal(0, 0.3, tuple(readout.dims)).astype(np.float32)
    readout.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(readout) + noise, readout.name))
    onnx.save(network, path / "model.fp32.onnx")
    inputs, _ = bundle.golden()
    with OnnxRuntime(path / "model.fp32.onnx") as broken:
        np.savez(path / "golden.npz", inputs=inputs, fp32=broken(inputs))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] |= {name: sha256(path / name) for name in ("model.fp32.onnx", "golden.npz")}
    manifest["digest"] = Manifest.model_validate(manifest).computed_digest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = validate(open_bundle(path), backend="onnxruntime-cpu")
    assert found.verdict == "fail"
    assert any("newly wrong" in reason for reason in found.reasons)


def test_a_masked_gradient_is_an_invalid_evaluation(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3: a reference whose gradient is zero for most images must not be certified as robust."""
    real = TorchModel.attacker

    def masked(self: TorchModel, *arguments: object, **options: object) -> Differentiable:
        attacker = real(self, *arguments, **options)

        def gradient(x: np.ndarray, y: np.ndarray) -> Gradient:
            found = attacker(x, y)
            return found._replace(gradient=np.where(np.arange(len(x))[:, None, None, None] % 3 == 0, found.gradient, 0))

        return gradient

    monkeypatch.setattr(TorchModel, "attacker", masked)
    found = validate(bundle, backend="onnxruntime-cpu", limit=30)
    assert found.verdict == "invalid"
    assert found.reasons[0].startswith("check 7")


def test_data_of_another_kind_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shuffled = Bundle(bundle.path, bundle.manifest.model_copy(update={"labels": bundle.manifest.labels[::-1]}))
    with pytest.raises(InputError, match="not what the network was made for"):
        validate(shuffled, backend="onnxruntime-cpu")
    with pytest.raises(InputError, match="download=True"):
        validate(bundle, backend="onnxruntime-cpu", data="cifar10", root=str(tmp_path))
