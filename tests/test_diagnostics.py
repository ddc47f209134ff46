"""Membrane distributions against direct counts and scipy, their pictures, and warnings that fire when they should."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import small_recipe
from PIL import Image
from scipy.stats import norm as normal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mpdsgr_deploy.cli import main
from mpdsgr_deploy.diagnostics.checkpoint_plots import plot_checkpoint
from mpdsgr_deploy.diagnostics.distribution import BINS, Distribution, bin_edges, layer_statistics, measure
from mpdsgr_deploy.diagnostics.distribution_plots import layer_channels, layer_steps, overview
from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics, warnings_of
from mpdsgr_deploy.diagnostics.picture import pixels
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import SpikingNet, build_model
from mpdsgr_deploy.mpd import Moments, theorem
from mpdsgr_deploy.snn import TdBN, Trace
from mpdsgr_deploy.training.board import log_epoch

THEOREM_COLOUR = (0xD5, 0x5E, 0x00)
EMPIRICAL_COLOUR = (0x00, 0x72, 0xB2)


def network(**sections: dict[str, object]) -> SpikingNet:
    """An untrained network whose tdBN has every channel differ."""
    torch.manual_seed(0)
    model = build_model(small_recipe(**sections), (1, 8, 8), 10).eval()
    draw = torch.Generator().manual_seed(1)
    for layer in model.layers():
        if isinstance(layer.norm, TdBN):
            layer.norm.weight.data.uniform_(0.3, 1.7, generator=draw)
            layer.norm.bias.data.uniform_(-1, 1, generator=draw)
    return model


def images(n: int = 20) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def traced(model: SpikingNet, x: torch.Tensor, seed: int | None = None) -> list[Trace]:
    traces: list[Trace] = []
    with torch.no_grad():
        model(x, traces.append, None if seed is None else torch.Generator().manual_seed(seed))
    return traces


FULLY_CONNECTED = {"model": {"name": "vgg11", "width": 1 / 64}, "encoding": {"T": 2}}
KINDS: list[dict[str, Any]] = [
    {},
    FULLY_CONNECTED,
    {"model": {"norm": "none"}},
    {"model": {"norm": "bn"}, "neuron": {"surrogate": "superspike", "v_threshold": 0.5}},
    {"encoding": {"name": "poisson"}, "neuron": {"surrogate": "rectangular", "reset": "soft"}},
]


@pytest.mark.parametrize("kind", KINDS, ids=["tdbn", "fully-connected", "none", "bn", "poisson"])
def test_counts_equal_numpy_histogram_and_direct_counts(kind: dict[str, Any]) -> None:
    model, x = network(**kind), images()
    measured = measure(model, x, batch_size=len(x), noise=torch.Generator().manual_seed(3))
    traces = traced(model, x, seed=3)
    assert [layer.layer for layer in measured] == [trace.layer for trace in traces]
    for layer, trace in zip(measured, traces, strict=True):
        for t, (u, spikes) in enumerate(trace.states):
            for c in range(u.shape[1]):
                potentials = u[:, c].numpy().ravel()
                assert layer.counts[t, c].tolist() == np.histogram(potentials, layer.edges.numpy())[0].tolist()
                near = np.abs(potentials - layer.v_threshold) < layer.half_width
                assert layer.in_window[t, c].item() == pytest.approx(near.mean(), abs=1e-6)
                assert layer.firing_rate[t, c].item() == pytest.approx(spikes[:, c].numpy().mean(), abs=1e-6)
                assert layer.size == potentials.size
        assert layer.counts.sum() > 0.99 * layer.counts[..., 0].numel() * layer.size  # the bins reach far enough
        assert (layer.theorem is None) == (not isinstance(trace.norm, TdBN))
        for found, expected in zip(layer.statistics()[1:], layer_statistics(trace)[1:], strict=True):
            assert found == (None if expected is None else pytest.approx(expected, abs=1e-5))


def test_batches_add_up_to_one_batch_of_all_images() -> None:
    """The reset term of Theorem 1 too: a mean over all images, not that of the last batch."""
    model, x = network(encoding={"T": 3}), images()
    traces = traced(model, x)
    for layer, trace in zip(measure(model, x, batch_size=7), traces, strict=True):
        whole = theorem(trace)
        last = theorem(trace._replace(states=[type(s)(s.u[14:], s.spikes[14:]) for s in trace.states]))
        torch.testing.assert_close(layer.theorem.mu.float(), whole.mu, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.theorem.sigma.float(), whole.sigma)
        assert (last.mu - whole.mu).abs().max() > 1e-3
        u = torch.stack([state.u for state in trace.states]).double().transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer.empirical.mu, u.mean(2) - layer.v_threshold, rtol=0, atol=1e-5)
        # a channel whose potential never varies: float32 leaves E[u^2] - E[u]^2 within 1e-6 of zero
        torch.testing.assert_close(layer.empirical.sigma, u.std(2, correction=0), rtol=0, atol=1e-3)
        assert layer.counts.sum((0, 2)).max() <= layer.size * len(trace.states)
        assert layer.size == u.shape[2]


def test_gaussians_have_the_mass_scipy_says_and_omega_lies_between_the_window_bins() -> None:
    for layer in measure(network(), images(), batch_size=20):
        for moments in (layer.theorem, layer.empirical):
            mass = layer.mass(moments, layer.edges)
            mean, deviation = (moment.double()[..., None].numpy() for moment in moments)
            expected = np.diff(normal.cdf(layer.edges.double().numpy(), mean + layer.v_threshold, deviation), axis=-1)
            np.testing.assert_allclose(mass.numpy(), expected, atol=1e-12)
            centres = (layer.edges[:-1] + layer.edges[1:]) / 2
            inside = (centres - layer.v_threshold).abs() < layer.half_width
            torch.testing.assert_close(mass[..., inside].sum(-1), layer.omega(moments).double(), rtol=0, atol=1e-6)
        assert (layer.mass(layer.empirical, layer.edges).sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("sigma", [1e-6, 0.3, 4.0, 1e4])
def test_bins_are_few_and_the_window_ends_on_edges(sigma: float) -> None:
    edges = bin_edges(Moments(torch.tensor([[-1.0]]), torch.tensor([[sigma]])), 1.0, 0.5)
    assert 10 <= len(edges) - 1 <= BINS
    assert {0.5, 1.0, 1.5} <= set(edges.tolist())
    assert edges[0] <= max(1 - 1 - 5 * sigma, 1 - 0.5 * BINS / 2)
    assert edges.diff().max() <= 0.5 + 1e-6


def test_noise_comes_from_the_given_generator_alone() -> None:
    model, x = network(encoding={"name": "rsc"}), images()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (measure(model, x, batch_size=8, noise=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].firing_rate, other[0].firing_rate)


def test_a_silent_channel_is_counted() -> None:
    model = network()
    norm = model.layers()[0].norm
    norm.bias.data[:2], norm.bias.data[2:] = -100.0, 2.0
    x = images()
    share = 2 / len(norm.bias)
    assert measure(model, x, batch_size=6)[0].statistics().silent_channels == pytest.approx(share)
    assert layer_statistics(traced(model, x)[0]).silent_channels == pytest.approx(share)


HEALTHY = LayerStatistics("conv1", 0.15, 0.42, 0.40, 0.41, 1.0, 0.1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"firing_rate": 0.005}, "conv2 (0.005): firing rate below 0.01"),
        ({"silent_channels": 0.6}, "conv2 (0.6): more than 50% of the channels never fired"),
        ({"firing_rate": 0.95}, "conv2 (0.95): firing rate above 0.9"),
        ({"scale": 2.5}, "conv2 (2.5): mean |lambda| above 2"),
        ({"omega_theorem": 0.12}, "conv2 (0.3): Omega by Theorem 1 differs by more than 0.15"),
        ({"omega_theorem": 0.62}, "conv2 (0.2): Omega by Theorem 1 differs by more than 0.15"),
    ],
)
def test_each_warning_fires_on_its_own_fault_only(change: dict[str, float], says: str) -> None:
    faulty = HEALTHY._replace(layer="conv2", **change)
    (line,) = warnings_of([HEALTHY, faulty])
    assert line.startswith(says)
    assert "; " in line  # what it means; what to do
    assert warnings_of([HEALTHY, faulty], [faulty]) == []
    assert warnings_of([faulty], [faulty._replace(layer="conv3")]) == [line]


def test_healthy_layers_and_layers_without_tdbn_are_not_warned_of() -> None:
    assert warnings_of([HEALTHY, HEALTHY._replace(omega_theorem=None, scale=None, silent_channels=None)]) == []


def test_training_logs_a_warning_when_it_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = HEALTHY._replace(firing_rate=0.0)._asdict()
    numbers = {"T": 8, "seconds": 1.0, "loss": 1.0, "train_accuracy": 0.5, "validation_accuracy": 0.5, "score": 0.5}
    states = [[HEALTHY._asdict()], [silent], [silent], [silent, {**silent, "layer": "conv2"}]]
    history: list[dict[str, Any]] = []
    caplog.set_level(logging.WARNING, "mpdsgr_deploy")
    with SummaryWriter(str(tmp_path)) as board:
        for epoch, layers in enumerate(states, 1):
            history.append({"epoch": epoch, **numbers, "layers": layers})
            log_epoch(board, history)
    assert [r.getMessage()[:18] for r in caplog.records] == ["epoch 2  conv1 (0)", "epoch 4  conv2 (0)"]
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in found.Tensors("warnings/text_summary")] == [2, 4]
    assert b"silent layer" in found.Tensors("warnings/text_summary")[0].tensor_proto.string_val[0]


def test_a_run_shows_pictures_at_its_interval_and_of_its_last_epoch(run_dir: Path) -> None:
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert found.Tags()["images"] == ["membrane/overview", "membrane/conv1", "membrane/conv2", "membrane/conv3"]
    for tag in found.Tags()["images"]:
        assert [event.step for event in found.Images(tag)] == [2, 3]


def drawn(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have exactly this colour."""
    return int((image == np.array(colour, np.uint8)).all(-1).sum())


def test_inspect_plots_writes_every_picture(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "plots"
    done = CliRunner().invoke(main, ["inspect", str(run_dir), "--plots", str(out), "--images", "50", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    layers = ["conv1", "conv2", "conv3"]
    names = {f"{layer}{part}.png" for layer in layers for part in ("", "-channels")} | {"overview.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        with Image.open(out / name) as picture:
            image = np.asarray(picture.convert("RGB"))
        assert min(image.shape[:2]) > 300
        assert len(np.unique(image.astype(int) @ [1 << 16, 1 << 8, 1])) > 50  # colours
        if name != "overview.png":
            assert min(drawn(image, THEOREM_COLOUR), drawn(image, EMPIRICAL_COLOUR)) > 100
    statistics = [LayerStatistics(**layer) for layer in shown["layers"]]
    assert [layer.layer for layer in statistics] == layers
    assert shown["warnings"] == warnings_of(statistics)


def test_inspect_draws_one_layer_and_refuses_what_it_cannot_draw(run_dir: Path, tmp_path: Path) -> None:
    measured_on, statistics = plot_checkpoint(
        run_dir, tmp_path / "one", layers=["conv2"], channels=[3, 999], images=10_000
    )
    names = {"overview.png", "conv2.png", "conv2-channels.png", "conv2-channel-3.png"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names
    assert measured_on == "the first 497 test images of digits"
    assert len(statistics) == 3
    with pytest.raises(InputError, match=r"unknown layer 'conv9'; allowed: conv1, conv2, conv3"):
        plot_checkpoint(run_dir, tmp_path / "none", layers=["conv9"])
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="not a set of plots"):
        plot_checkpoint(run_dir, tmp_path / "mine")
    done = CliRunner().invoke(main, ["inspect", str(run_dir), "--images", "5"])
    assert "a checkpoint without --plots ignores --limit" in done.stderr


@pytest.mark.parametrize("kind", KINDS[1:3], ids=["fully-connected", "none"])
def test_layers_without_tdbn_are_drawn_without_theorem(kind: dict[str, Any]) -> None:
    layers = measure(network(**kind), images(), batch_size=20)
    layer = layers[-1]
    assert layer.theorem is None
    for image in (pixels(layer_steps(layer)), pixels(layer_channels(layer))):
        assert drawn(image, THEOREM_COLOUR) == 0
        assert drawn(image, EMPIRICAL_COLOUR) > 100
    assert pixels(overview([found.statistics() for found in layers])).shape[2] == 3


@pytest.mark.parametrize(("T", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (8, (2, 4))])
def test_every_step_has_a_panel(T: int, shape: tuple[int, int]) -> None:
    layer: Distribution = measure(network(encoding={"T": T}), images(4), batch_size=4)[0]
    figure = layer_steps(layer)
    assert [axes.get_title()[:6] for axes in figure.axes if axes.get_visible()] == [f"t = {t + 1}," for t in range(T)]
    assert len(figure.axes) == shape[0] * shape[1]
