"""The strongest attack written here: the yardstick that the attacks of a tier are held against.

    python benchmarks/research.py export/bundles/digits --limit 100
    python benchmarks/research.py runs/digits-reg --portfolio grid --root data

Takes bundles and training runs; a run's best network is exported to ONNX first, so that every gradient comes from the
attack graph in onnxruntime. One line of JSON per attempt goes to benchmarks/results/research.jsonl; an attempt that has
a line already is not made again, so a killed run resumes. `research_page.py` renders the lines.
Portfolios, lists of attempts, are in `portfolios.py`.
"""

import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
import torch
from numpy.typing import NDArray
from portfolios import CHAINED, ON_THE_FIRSTS, PORTFOLIOS, Attempt

from mpdsgr_deploy.attack_graph import adaptive
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker, Loss
from mpdsgr_deploy.attacks import apgd, pgd, sa_pgd, square
from mpdsgr_deploy.attacks.condition import Batch
from mpdsgr_deploy.attacks.mpd_apgd import Still
from mpdsgr_deploy.attacks.pgd import Draw
from mpdsgr_deploy.attacks.tiers import entry, resolved
from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.protocols import Adaptive, Gradient, State
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import IMAGES, load_images
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings
from mpdsgr_deploy.snn import make_surrogate
from mpdsgr_deploy.surrogates import ADAPTIVE, scaled
from mpdsgr_deploy.trained_networks import load_bundled, load_network

RESULTS = Path(__file__).parent / "results" / "research.jsonl"
ONE_THREAD = RuntimeSettings(threads=1, chunk=32)


class Network(NamedTuple):
    """An ONNX file, what it is called, its recipe, the images it is attacked on, and the torch network behind it."""

    name: str
    file: Path
    recipe: Recipe
    images: Images
    model: SpikingNet


@click.command()
@click.argument("networks", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--portfolio", type=click.Choice(list(PORTFOLIOS)), default="research", show_default=True)
@click.option("--root", help="Where the data set lies.  [default: the recipe's]")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Test images.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(networks: tuple[Path, ...], portfolio: str, root: str | None, limit: int, out: Path) -> None:
    """Attack each of NETWORKS (bundles or training runs) and append a line per attempt."""
    for path in networks:
        with opened(path, root, limit) as network:
            for line in attempts(network, portfolio, out):
                left = f"{len(line['left'])} of {len(line['before'])} left"
                click.echo(f"{network.name}: {Attempt(**line['attempt'])}: {left}, {line['seconds']:.0f} s")


@contextmanager
def opened(path: Path, root: str | None, limit: int) -> Iterator[Network]:
    """A bundle's float32 network or a run's best one, with its first test images."""
    if (path / "manifest.json").exists():
        bundle = open_bundle(path)
        recipe, carried = bundle.manifest.recipe, path / IMAGES
        images = load_images(carried) if carried.exists() else load_test(recipe.data.at(root))
        model = load_bundled(bundle, otherwise="give a network that this package trained")
        yield Network(path.name, bundle.variant("fp32"), recipe, images[:limit], model)
        return
    checkpoint, model = load_network(find_checkpoint(path))
    images = load_test(checkpoint.recipe.data.at(root))[:limit]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save(to_graph(simplify(model), checkpoint.shape), file)
        yield Network(path.name, file, checkpoint.recipe, images, model)


def attempts(network: Network, portfolio: str, out: Path) -> Iterator[dict[str, Any]]:
    """The lines of all attempts, old and new; new ones are appended to `out`."""
    bench = Laboratory(network)
    standing = bench.right(bench.x, np.arange(len(bench.y)))
    known = {"network": network.name, "sha256": bench.sha256, "n": len(bench.y), "portfolio": portfolio}
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for number, attempt in enumerate(PORTFOLIOS[portfolio]()):
        key = {**known, "attempt": attempt._asdict()}
        line = next((one for one in lines if _about(one) == key), None)
        if line is None:
            started = time.perf_counter()
            left, gradients = bench.attack(attempt, standing)
            line = {
                **key,
                "eps": bench.eps,
                "before": standing.tolist(),
                "left": left.tolist(),
                "gradients": gradients,
                "seconds": round(time.perf_counter() - started, 1),
                "provenance": provenance(),
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if portfolio in CHAINED or (portfolio in ON_THE_FIRSTS and not number):
            standing = np.intersect1d(standing, np.array(line["left"], np.int64))
        yield line


def _about(line: dict[str, Any]) -> dict[str, Any]:
    """What a line is about; fields that attempts did not have when it was written have their defaults."""
    about = {name: line[name] for name in ("network", "sha256", "n", "portfolio")}
    return {**about, "attempt": Attempt(**line["attempt"])._asdict()}


class Laboratory:
    """One network under attack. Images are known by their places in the test set."""

    stochastic = False

    def __init__(self, network: Network) -> None:
        self._file, self.eps, self._network = network.file, network.recipe.attack.eps, network
        self.x, self.y = network.images.unit(), network.images.classes
        self._predict = OnnxRuntime(network.file, settings=ONE_THREAD)
        self.sha256 = sha256(network.file)
        logits = self._predict(self.x)
        logits[np.arange(len(self.y)), self.y] = -np.inf
        self._wrong = logits.argsort(1)[:, ::-1]  # wrong classes, likeliest first

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._predict(x)

    def attacker(self, surrogate: str, *, loss: Loss, draws: int = 1) -> GraphAttacker:
        """Through a surrogate by name."""
        return GraphAttacker(self._file, surrogate, loss=loss, settings=ONE_THREAD)

    def adaptive(self, *, draws: int = 1) -> GraphAttacker:
        """Through surrogates that adapt."""
        return self.attacker(ADAPTIVE, loss="ce")

    def right(self, x: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places [m] whose images x [m, C, H, W] onnxruntime gets right."""
        return places[self._predict(x).argmax(1) == self.y[places]]

    def attack(self, attempt: Attempt, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Which places still stand after an attempt, and how many gradients (or queries) it took."""
        x, y, eps, steps = self.x[places], self.y[places], self.eps, attempt.steps
        if not len(places):
            return places, 0
        if attempt.method == "square":
            search = square(self._predict, x, y, eps=eps, queries=steps, seed=attempt.seed, indices=places)
            return self.right(search.images, places), int(search.queries.sum())
        if attempt.method == "mpd-apgd":
            return self._release(places, steps)
        if attempt.layer is not None:
            climbed = Counted(self._layered(attempt.surrogate, attempt.layer, attempt.factor))
            made = sa_pgd(climbed, x, y, eps=eps, steps=steps, draw=starts(attempt.seed, places))
            return self.right(made, places), climbed.gradients
        sharpness = 2 / math.pi * math.tan(attempt.share * math.pi)
        with (
            patch.object(adaptive, "SHARPNESS", sharpness),
            self.attacker(attempt.surrogate, loss=attempt.loss) as attacker,
        ):
            counted = Counted(attacker)
            target: Any = counted
            if attempt.wrong is not None:
                target, y = Aimed(counted), Aimed.encoded(y, self._wrong[places, attempt.wrong])
            draw = starts(attempt.seed, places)
            if attempt.method == "pgd":
                made = pgd(target, x, y, eps=eps, step=eps / 4, steps=steps, draw=draw, keep="broken")
            else:
                climb: Any = {"apgd": apgd, "sa-pgd": sa_pgd}[attempt.method]
                made = climb(target, x, y, eps=eps, steps=steps, draw=draw)
        assert np.abs(made - x).max() <= eps + 1e-6
        return self.right(made, places), counted.gradients

    def _release(self, places: NDArray[np.int64], steps: int) -> tuple[NDArray[np.int64], int]:
        """What MPD-APGD leaves as a release has it, and its gradients."""
        (condition,) = resolved([entry("mpd-apgd", "mpd-apgd", steps=steps)], self._network.recipe.attack, "superspike")
        batch = Batch(self.x[places], self.y[places], places)
        with condition.target(self) as targets:
            attacked = condition.attack(targets, batch, condition.generators(batch))
        return self.right(attacked.images, places), attacked.evaluations

    def _layered(self, surrogate: str, layer: int, factor: float) -> Adaptive:
        """The torch network with one layer's surrogate `factor` times as sharp."""
        model = copy.deepcopy(self._network.model).eval()
        for number, part in enumerate(model.layers()):
            part.neuron.surrogate = make_surrogate(scaled(surrogate, 1 / factor if number == layer else 1.0))

        def gradient(x: NDArray[np.float32], y: NDArray[np.int64]) -> Gradient:
            answer = input_gradient(model, torch.from_numpy(x), torch.from_numpy(y))
            return Gradient(*(part.numpy() for part in answer))

        return Still(gradient)


class Counted:
    """An attacker that counts gradients."""

    def __init__(self, target: Any) -> None:
        self._target, self.gradients = target, 0
        self.start = target.start

    def __call__(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> Gradient:
        self.gradients += len(x)
        return self._target(x, y)

    def step(self, x: NDArray[np.float32], y: NDArray[np.int64], state: State) -> tuple[Gradient, State]:
        """As of an Adaptive."""
        self.gradients += len(x)
        return self._target.step(x, y, state)


class Aimed:
    """Climbs log softmax of a wrong class, for attacks that judge by the true one; classes are pairs of both."""

    def __init__(self, target: Counted) -> None:
        self._target = target

    @staticmethod
    def encoded(true: NDArray[np.int64], wrong: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pairs [B]."""
        return true + 1000 * wrong

    def __call__(self, x: NDArray[np.float32], pairs: NDArray[np.int64]) -> Gradient:
        true, wrong = pairs % 1000, pairs // 1000
        logits, loss, gradient = self._target(x, wrong)
        fooled = logits.argmax(1) != true
        answers = np.zeros((len(x), int(pairs.max()) + 2), np.float32)  # the last column is no pair
        answers[np.arange(len(x)), np.where(fooled, -1, pairs)] = 1
        return Gradient(answers, -loss, -gradient)


def sha256(file: Path) -> str:
    """The hash of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def starts(seed: int, places: Sequence[int] | NDArray[np.int64]) -> Draw:
    """U(-1, 1) per pixel from the seed and each image's place alone."""
    rngs = [np.random.default_rng((seed, int(place))) for place in places]
    return lambda shape: np.stack([rng.uniform(-1, 1, shape[1:]) for rng in rngs]).astype(np.float32)


if __name__ == "__main__":
    main()
