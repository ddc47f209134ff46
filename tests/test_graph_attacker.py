"""Attackers that run an attack graph: their chunks, noise, adaptive surrogates and what they share."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_networks import NETWORKS, SMALL, deviation, images
from test_export import exported

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker, NetworkFile
from mpdsgr_deploy.attacks.attacker_surrogate import with_surrogate
from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.runtime.torch_model import noise_inputs
from mpdsgr_deploy.snn import Surrogate, Trace


def attacker(name: str, folder: Path, surrogate: str = "triangle", **options: Any) -> GraphAttacker:
    model, graph, shape = NETWORKS[name]()
    save(graph, folder / "model.onnx")
    return GraphAttacker(folder / "model.onnx", surrogate, noise=noise_inputs(model, shape), **options)


def test_chunks_do_not_change_the_answer(tmp_path: Path) -> None:
    x, y = images(33, (3, 16, 16))
    with (
        attacker("vgg-small", tmp_path, settings=RuntimeSettings(threads=1)) as whole,
        attacker("vgg-small", tmp_path, settings=RuntimeSettings(threads=1, chunk=4)) as parts,
    ):
        for a, b in zip(whole(x, y), parts(x, y), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        with pytest.raises(InputError, match="pixels must be"):
            whole(x + 1, y)


def test_noise_is_fresh_seeded_and_averaged(tmp_path: Path) -> None:
    x, y = images(6, SMALL)
    with attacker("rsc and stog", tmp_path, seed=5) as one, attacker("rsc and stog", tmp_path, seed=5, draws=2) as two:
        first, second = one(x, y), one(x, y)
        assert not np.array_equal(first.gradient, second.gradient)
        for a, b, mean in zip(first, second, two(x, y), strict=True):
            np.testing.assert_allclose((a + b) / 2, mean, atol=1e-6)
    with pytest.raises(InputError, match="takes the noise"):
        GraphAttacker(tmp_path / "model.onnx", "triangle")


def test_adaptive_is_assg_by_its_formula(tmp_path: Path) -> None:
    """Two evaluations against torch with a sharpness of its own for each neuron; the second of half of the images."""
    model, _, shape = exported("vgg-small")
    x, y = images(8, shape)
    rows = np.arange(0, 8, 2)
    states: dict[str, list[np.ndarray]] = {}
    with attacker("vgg-small", tmp_path, "adaptive") as run:
        state = run.start(8)
        for chosen in (slice(None), rows):
            state = {name: value[chosen] for name, value in state.items()}
            states = {layer: [pair[chosen] for pair in pairs] for layer, pairs in states.items()}
            found, state = run.step(x[chosen], y[chosen], state)
            expected = assg(model, x[chosen], y[chosen], states)
            np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
            assert deviation(found.gradient, expected.gradient).max() <= 1e-5
            for layer, (mean, spread) in states.items():
                np.testing.assert_allclose(state[f"mean/{layer}"], mean, atol=1e-5)
                np.testing.assert_allclose(state[f"deviation/{layer}"], spread, atol=1e-5)
            x = (x + 0.05).clip(0, 1)


def assg(model: SpikingNet, x: np.ndarray, y: np.ndarray, states: dict[str, list[np.ndarray]]) -> Gradient:
    """By torch; moves `states`, the mean and the deviation [B, T, ...] of each layer."""
    attacked = with_surrogate(model, "triangle")
    sharpness: dict[str, list[torch.Tensor]] = {}

    def observe(trace: Trace) -> None:
        v = torch.stack([s.u for s in trace.states], 1).double().numpy() - trace.neuron.v_threshold
        mean, spread = states.get(trace.layer, [np.ones_like(v), np.zeros_like(v)])
        mean = 0.9 * mean + 0.1 * np.abs(v)
        spread = 0.9 * spread + 0.1 * np.abs(np.abs(v) - mean)
        states[trace.layer] = [mean, spread]
        s = 2 / np.pi * np.tan(0.4 * np.pi) / (mean + 1.5 * spread + 1e-4)
        sharpness[trace.layer] = list(torch.from_numpy(s).float().unbind(1))

    with torch.no_grad():
        attacked(torch.from_numpy(x), observe)

    def surrogate(layer: str, t: int) -> Surrogate:
        s = sharpness[layer][t]
        return Surrogate("assg", lambda v: s / 2 / (1 + (torch.pi / 2 * s * v) ** 2), float("inf"))

    for layer in attacked.layers():
        layer.neuron.stepwise = partial(surrogate, layer.name)
    found = input_gradient(attacked, torch.from_numpy(x), torch.from_numpy(y))
    return Gradient(*(part.numpy() for part in found))


def test_attackers_of_one_kind_share_the_weights_and_answer_as_alone(bundle: Bundle) -> None:
    model = bundle.variant("fp32")
    draw = np.random.default_rng(0)
    x, y = draw.random((3, *bundle.manifest.input_shape), np.float32), np.array([0, 1, 2])
    network = NetworkFile(model, lambda x: x)
    names = [("triangle:1", "ce"), ("triangle:0.5", "dlr"), ("triangle:1+averaged", "ce"), ("triangle:1", "ce")]
    names += [("triangle:1+detached", "ce"), ("triangle:1", "weighted")]
    shared = [network.attacker(name, loss=loss, draws=1) for name, loss in names]
    sessions = [attacker._session for attacker in shared]
    assert sessions[0] is sessions[1]
    assert len(set(map(id, sessions))) == 5
    with shared[0], shared[1]:
        pass
    for attacker, (name, loss) in zip(shared, names, strict=True):
        with GraphAttacker(model, name, loss=loss) as alone:
            towards = np.eye(10, dtype=np.float32)[y] if loss == "weighted" else y
            for own, expected in zip(attacker(x, towards), alone(x, towards), strict=True):
                np.testing.assert_array_equal(own, expected)
