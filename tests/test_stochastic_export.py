"""Networks that draw noise, exported: the same noise for the same image, whatever runs the network."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import small_recipe
from stochastic_networks import GATES, NETWORKS, SHAPE, exported, images, warmed_up
from test_firing import observed

from mpdsgr_deploy.attacks.resumable_run import Journal, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import WEIGHTS, Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.diagnostics.facts import bundle_facts
from mpdsgr_deploy.diagnostics.spike_flips import flips_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.firing import FiringRates
from mpdsgr_deploy.runtime.torch_model import TorchModel, noise_inputs
from mpdsgr_deploy.trained_networks import load_model
from mpdsgr_deploy.validation import Target, validate


@pytest.mark.parametrize("name", NETWORKS)
def test_every_draw_is_an_input_and_the_answers_are_those_of_torch(name: str, tmp_path: Path) -> None:
    model, network = exported(name)
    save(network, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    found = {x.name: tuple(d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim) for x in graph.input}
    assert found == {"images": ("batch", *SHAPE), **{k: ("batch", *shape) for k, shape in NETWORKS[name][1].items()}}
    assert not any(node.op_type.startswith(("Random", "Bernoulli")) for node in graph.node)
    reference = TorchModel(model, SHAPE, seed=3)
    with OnnxRuntime(tmp_path / "model.onnx", noise=reference.noise) as artefact:
        for batch in (1, 2, 5, 33):
            assert compare(reference(images(batch)), artefact(images(batch))).holds
    assert not compare(TorchModel(model, SHAPE, seed=4)(images(33)), reference(images(33))).holds  # the noise matters


def test_a_deterministic_network_needs_no_noise() -> None:
    assert noise_inputs(warmed_up(small_recipe()), SHAPE) == ()
    assert NoiseSource()(images(2)) == {}


def test_the_bundle_lists_its_noise(stochastic: Bundle) -> None:
    listed = {entry.name: (entry.kind, entry.shape) for entry in stochastic.manifest.noise}
    assert listed == {
        "uniform_0": ("uniform", (3, *SHAPE)),
        **{f"uniform_{i + 1}": ("uniform", shape) for i, shape in enumerate(GATES)},
    }
    accuracy = stochastic.manifest.variants["fp32"].accuracy
    assert accuracy.correct > 20, accuracy  # of 40: the network has learned something behind its noise


def test_it_is_inspected_with_the_noise_it_answers_with(stochastic: Bundle) -> None:
    facts = bundle_facts(stochastic)
    assert facts["noise uniform_1"] == "uniform, float32 [B, 3, 8, 8, 8]"
    convolutions = 8 * 8 * 8 * 9 + 16 * 4 * 4 * 9 * (8 + 16)
    assert facts["fp32 MACs an image"] == 3 * convolutions + 10 * 16 * 4 * 4
    with open_predictor(stochastic, "torch") as reference:
        x, _ = stochastic.golden()
        draws = [torch.from_numpy(draw) for draw in reference.noise(x).values()]
        rates: dict[str, list[float]] = {}
        with torch.no_grad():
            reference._model(
                torch.from_numpy(x),
                lambda trace: rates.update({trace.layer: [s.spikes.mean().item() for s in trace.states]}),
                draws,
            )
    shown = ", ".join(f"{layer} {np.mean(steps):.3f}" for layer, steps in rates.items())
    assert facts["fp32 firing rates, golden inputs"] == shown
    (flips,) = flips_of(stochastic, images=20)[1]
    assert 0 < flips.mean("rate") < 0.02  # with other noise a spike in five would differ


def test_poisson_spikes_are_one_comparison(stochastic: Bundle) -> None:
    """Nothing else reads the image: the straight-through term of the gradient is not in the graph."""
    nodes = onnx.load(stochastic.variant("fp32")).graph.node
    assert [node.op_type for node in nodes if "images" in node.input] == ["GreaterOrEqual"]


def test_one_seed_one_answer_on_both_backends_and_in_every_batch(stochastic: Bundle) -> None:
    x = load_test(stochastic.manifest.recipe.data).unit()[:33]
    with open_predictor(stochastic) as artefact, open_predictor(stochastic, "torch") as reference:
        first = artefact(x)
        assert np.array_equal(artefact(x), first)
        assert compare(reference(x), first).holds
        assert compare(np.concatenate([artefact(x[i : i + 5]) for i in range(0, 33, 5)]), first).holds
        assert compare(artefact(x[::-1].copy())[::-1], first).holds
    with (
        open_predictor(stochastic, seed=8) as artefact,
        open_predictor(stochastic, "torch", seed=8) as reference,
    ):
        assert compare(reference(x), artefact(x)).holds
        assert compare(artefact(x), first).within_tolerance < 5
    with open_predictor(stochastic, seed=stochastic.manifest.recipe.validation.seed) as artefact:
        assert np.array_equal(artefact(x), first)


def test_it_is_validated_like_any_other(stochastic: Bundle) -> None:
    """Its attackers, in torch and on the artefact, draw noise of their own, so verdicts differ by chance only."""
    report = validate(Target(stochastic), gate=Gate(max_drop=0.25))
    clean = report.rows[0]
    assert (clean.name, clean.n) == ("clean", 40)
    assert report.parity.holds
    (function,) = [check for check in report.health if check.number == 8]
    assert function.passed, function.saw
    assert all(row.flips.newly_wrong <= 1 for row in report.rows[:3])
    assert all(row.flips.p_value > 0.01 for row in report.rows)


def test_a_batch_attacked_after_a_kill_meets_the_same_noise(stochastic: Bundle, tmp_path: Path) -> None:
    images, attack = load_test(stochastic.manifest.recipe.data)[:8], stochastic.manifest.recipe.attack
    x, y = images.unit(), images.classes
    with Target(stochastic).open() as artefact:
        suite = Suite.of(Source(artefact, "triangle:1"), TIERS["commit"].entries, attack, seed=1)
        for condition in (c for c in suite.conditions if c.name in ("pgd", "strong adaptive")):
            attacked = partial(run, suite, condition, x, y, y, batch_size=4)
            whole = [part.attacked.images for part in attacked()]
            journal = Journal(tmp_path, condition.name)
            next(attacked(journal=journal))
            again = [part.attacked.images for part in attacked(journal=journal)]
            assert np.array_equal(whole, again)


def test_firing_rates_are_those_of_the_same_noise_and_poisson_spikes_are_no_layer(stochastic: Bundle) -> None:
    manifest = stochastic.manifest
    x, noise = load_test(manifest.recipe.data).unit()[:33], NoiseSource(manifest.noise, 7)
    model = load_model(stochastic.file(WEIGHTS), manifest.recipe, SHAPE, len(manifest.labels))
    with FiringRates(stochastic) as network, open_predictor(stochastic) as plain:
        logits, rates = network(x)
        np.testing.assert_allclose(logits, plain(x), atol=1e-5)
    assert network.layers == ("conv1", "conv2", "conv3")
    expected = np.stack(list(observed(model, x, noise(x).values()).values()), 1)  # ungated
    assert (np.abs(rates - expected) < 1e-6).mean() > 0.95
    noise.reseed(8)
    other = np.stack(list(observed(model, x, noise(x).values()).values()), 1)
    assert (np.abs(rates - other) < 1e-6).mean() < 0.2


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "torch"])
@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped"])
def test_noise_inputs_that_do_not_fit_are_one_line(stochastic: Bundle, backend: str, change: str) -> None:
    first, *others = stochastic.manifest.noise
    changed = {"missing": {}, "renamed": {"name": "noise"}, "reshaped": {"shape": (2, *SHAPE)}}[change]
    noise = (first.model_copy(update=changed), *others) if changed else tuple(others)
    edited = Bundle(stochastic.path, stochastic.manifest.model_copy(update={"noise": noise}))
    with pytest.raises(InputError, match=r"takes the noise uniform_0 \[3, 1, 8, 8\], .*; export again") as error:
        open_predictor(edited, backend).__enter__()
    assert "\n" not in str(error.value)


def test_a_stochastic_file_without_a_source_of_noise(stochastic: Bundle) -> None:
    with pytest.raises(InputError, match="but gets none"):
        OnnxRuntime(stochastic.variant("fp32"))
