"""Networks that draw noise, exported: the same noise for the same image, whatever runs the network."""

import math
import subprocess
import sys
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import small_recipe
from exporting_once import to_graph
from scipy.stats import binom, kstest
from test_firing import observed

from mpdsgr_deploy.attacks.run import Journal, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import WEIGHTS, Bundle, NoiseInput
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.diagnostics.facts import bundle_facts
from mpdsgr_deploy.diagnostics.flips import flips_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.networks import load_model
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.recipe import Gate, Recipe
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.firing import FiringRates
from mpdsgr_deploy.runtime.image_noise import normal, uniform
from mpdsgr_deploy.runtime.torch_model import TorchModel, noise_inputs
from mpdsgr_deploy.snn.draws import in_turn
from mpdsgr_deploy.snn.encoding import Poisson
from mpdsgr_deploy.validation import Target, validate

SHAPE = (1, 8, 8)
GATES = [(3, 8, 8, 8), (3, 16, 4, 4), (3, 16, 4, 4)]  # of the small network's neurons, a draw a step
NETWORKS = {
    "poisson": (small_recipe(encoding={"name": "poisson"}), {"uniform_0": (3, *SHAPE)}),
    "sqe": (small_recipe(encoding={"name": "sqe", "levels": 3}), {"uniform_0": (3, *SHAPE)}),
    "rsc and stog": (
        small_recipe(encoding={"name": "rsc"}, defence={"stog": {}}),
        {"normal_0": (3, *SHAPE), **{f"uniform_{i + 1}": shape for i, shape in enumerate(GATES)}},
    ),
}
PAIR = (NoiseInput(name="a", kind="uniform", shape=(3, 5)), NoiseInput(name="b", kind="normal", shape=(3, 5)))


def warmed_up(recipe: Recipe) -> SpikingNet:
    """A random network whose layers all fire and whose gates, if any, are neither open nor closed."""
    torch.manual_seed(0)
    model, _ = build_defended(recipe, SHAPE, 10)
    for layer in model.layers():
        for p in layer.neuron.parameters():
            torch.nn.init.uniform_(p, 0.3, 0.9)
        layer.norm.momentum = 1.0
    model(torch.rand(32, *SHAPE))
    return model.eval()


@cache
def exported(name: str) -> tuple[SpikingNet, ir.Model]:
    """One of the networks and its graph, for tests to read: the exporter takes its time."""
    model = warmed_up(NETWORKS[name][0])
    return model, to_graph(simplify(model), SHAPE)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, *SHAPE), np.float32)


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


def test_poisson_fed_from_outside_fires_at_the_rate_of_the_pixels() -> None:
    pixels, T = np.array([0.0, 0.05, 0.3, 0.5, 0.95, 1.0], np.float32), 20_000
    x = pixels.reshape(1, 1, 1, 6)
    noise = NoiseSource([NoiseInput(name="u", kind="uniform", shape=(T, 1, 1, 6))])(x)
    spikes = Poisson(T, 1)(torch.from_numpy(x), lambda x: x, in_turn([torch.from_numpy(noise["u"])]))
    for pixel, count in zip(pixels.tolist(), spikes.sum(0).flatten().tolist(), strict=True):
        low, high = binom.interval(0.9999, T, pixel)
        assert low <= count <= high


def test_draws_are_handed_out_in_turn_time_first() -> None:
    first, second = torch.rand(2, 3, 5), torch.rand(2, 4, 5)
    draw, x = in_turn([first, second]), torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(draw("uniform", 3, x), first.double().transpose(0, 1))
    assert torch.equal(draw("normal", 4, x), second.double().transpose(0, 1))
    with pytest.raises(InputError, match="more often than 2 times"):
        draw("uniform", 3, x)


def test_noise_belongs_to_the_image_not_to_its_batch() -> None:
    source, x = NoiseSource(PAIR, seed=1), images(5)
    whole = source(x)
    assert {name: draw.shape for name, draw in whole.items()} == {"a": (5, 3, 5), "b": (5, 3, 5)}
    shuffled = source(x[[4, 0, 4]])
    for name, draw in whole.items():
        assert draw.dtype == np.float32
        assert np.array_equal(shuffled[name], draw[[4, 0, 4]])
        assert len(np.unique(draw)) == draw.size  # no image, step or neuron shares a draw
    x[0, 0, 0, 0] = 0.0
    zero, negative = source(x), source(np.where(x == 0, np.float32(-0.0), x))
    assert np.array_equal(zero["a"], negative["a"])


def test_another_seed_pixel_or_input_is_other_noise() -> None:
    x = images(2)
    moved = x.copy()
    moved[1, 0, 3, 3] = np.nextafter(moved[1, 0, 3, 3], np.float32(0))
    first, other, near = NoiseSource(PAIR, seed=1)(x), NoiseSource(PAIR, seed=2)(x), NoiseSource(PAIR, seed=1)(moved)
    renamed = NoiseSource([PAIR[0].model_copy(update={"name": "c"})], seed=1)(x)
    assert not np.isin(first["a"], other["a"]).any()
    assert np.array_equal(near["a"][0], first["a"][0])
    assert not np.isin(first["a"][1], near["a"][1]).any()
    assert not np.isin(first["a"], renamed["c"]).any()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range(seed: int) -> None:
    with pytest.raises(InputError, match="between 0 and 2\\^64 - 1"):
        NoiseSource(PAIR, seed)


def test_the_statistics_of_the_draws() -> None:
    count = 100_001  # odd: words come in pairs
    u, n = (draw(bytes(range(16)), (count,)).astype(np.float64) for draw in (uniform, normal))
    assert 0 <= u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
    for draws, mean, variance, fourth, law in ((u, 0.5, 1 / 12, 1 / 80, "uniform"), (n, 0, 1, 3, "norm")):
        assert abs(draws.mean() - mean) < 4 * (variance / count) ** 0.5
        assert abs(draws.var() - variance) < 4 * ((fourth - variance**2) / count) ** 0.5
        assert kstest(draws, law).pvalue > 0.01
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / count**0.5  # also between the two of a pair


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011): four 64-bit words of a key and a counter below 2^64."""
    mask = 2**64 - 1
    x, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(second >> 64) ^ x[1] ^ k0, second & mask, (first >> 64) ^ x[3] ^ k1, first & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x


def test_the_draws_by_hand() -> None:
    """From the definition in plain integers, so that no numpy may change a bundle's noise unnoticed."""
    x = images(1)
    found = NoiseSource(PAIR, seed=5)(x)
    image = blake2b(x.tobytes(), key=(5).to_bytes(8, "little"), digest_size=32).digest()
    words = {}
    for name in "ab":
        key = blake2b(name.encode(), key=image, digest_size=16).digest()
        halves = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        blocks = [word for counter in (1, 2) for word in philox(halves, counter)]  # numpy counts before it draws
        words[name] = [half for word in blocks for half in (word & 0xFFFFFFFF, word >> 32)]
    assert found["a"].ravel().tolist() == [(word >> 8) / 2**24 for word in words["a"][:15]]
    expected: list[float] = []
    for a, b in zip(words["b"][::2], words["b"][1::2], strict=True):
        radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
        expected += [radius * math.cos(2 * math.pi * b / 2**32), radius * math.sin(2 * math.pi * b / 2**32)]
    np.testing.assert_allclose(found["b"].ravel(), expected[:15], rtol=2e-7)


def test_a_fresh_process_without_torch_makes_the_same_noise() -> None:
    script = (
        "import sys, numpy as np; from mpdsgr_deploy.bundle import NoiseInput; "
        "from mpdsgr_deploy.runtime.image_noise import NoiseSource; "
        "source = NoiseSource([NoiseInput(name='a', kind='normal', shape=(4,))], 9); "
        "print(source(np.full((1, 1, 2, 2), 0.5, np.float32))['a'].tobytes().hex(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    source = NoiseSource([NoiseInput(name="a", kind="normal", shape=(4,))], 9)
    here = source(np.full((1, 1, 2, 2), 0.5, np.float32))["a"]
    assert done.stdout.split() == [here.tobytes().hex(), "False"]


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
