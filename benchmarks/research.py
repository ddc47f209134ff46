"""The strongest attack written here: the yardstick that the attacks of a tier are held against.

    python benchmarks/research.py export/bundles/digits --limit 100
    python benchmarks/research.py runs/digits-reg --portfolio grid --root data

Takes bundles and training runs; a run's best network is exported to ONNX first, so that every gradient comes from the
attack graph in onnxruntime. One line of JSON per attempt goes to benchmarks/results/research.jsonl; an attempt that has
a line already is not made again, so a killed run resumes. `research_page.py` renders the lines.

research   many surrogates, losses and random starts with 500 steps each; each attempt meets what still stands
each       many kinds of attempt with 100 steps on the same images, those that the first attempt leaves
grid       APGD through superspike:k by k and number of steps, each on all images
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks import apgd, pgd, sa_pgd, square
from mpdsgr_deploy.attacks.pgd import Draw
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.checkpoint import find_checkpoint
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.networks import load_network
from mpdsgr_deploy.protocols import Gradient, State
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import IMAGES, load_images
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.runtime.machine_settings import RuntimeSettings

RESULTS = Path(__file__).parent / "results" / "research.jsonl"
ONE_THREAD = RuntimeSettings(threads=1, chunk=32)


class Attempt(NamedTuple):
    """One attack. wrong: the class aimed at, by its rank among the wrong ones on the clean image; None: untargeted."""

    method: str  # of `Laboratory`
    surrogate: str = ""
    loss: Literal["ce", "dlr"] = "ce"
    steps: int = 500
    seed: int = 0
    wrong: int | None = None


class Network(NamedTuple):
    """An ONNX file, what it is called, its recipe and the images it is attacked on."""

    name: str
    file: Path
    recipe: Recipe
    images: Images


def research() -> list[Attempt]:
    """Every kind of attempt that was seen to break an image, strongest first, most of them with several starts."""
    sharp = [f"superspike:{k}" for k in (10, 20, 30)]
    heavy = [Attempt(method, name, seed=seed) for seed in (0, 1) for method in ("apgd", "sa-pgd") for name in sharp]
    other = [Attempt("apgd", name) for name in ("superspike:5", "superspike:50", "superspike:100", "exponential:0.1")]
    dlr = [Attempt("apgd", f"superspike:{k}", "dlr") for k in (10, 30)]
    aimed = [Attempt("apgd", "superspike:20", wrong=rank) for rank in range(3)]
    narrow = [Attempt("apgd", name) for name in ("triangle:0.25", "rectangular:1", "sigmoid:20", "rate")]
    rest = [Attempt("sa-pgd", "adaptive"), Attempt("pgd", "superspike:20", steps=200), Attempt("square", steps=2000)]
    return [*heavy, *dlr, *rest, *aimed, *other, *narrow]


def each() -> list[Attempt]:
    """Kinds of attempt that cost the same, for what each adds to APGD through superspike:1."""
    heavy = ("superspike:1", "superspike:3", "superspike:10", "superspike:20", "superspike:30", "superspike:100")
    detached = [Attempt(method, "superspike:20+detached", steps=100, seed=1) for method in ("apgd", "sa-pgd")]
    thin = ("triangle:1", "triangle:0.25", "rectangular:1", "sigmoid:4", "sigmoid:20", "exponential:0.1", "rate")
    untargeted = [Attempt("apgd", name, steps=100, seed=1) for name in (*heavy, *thin, "straight-through")]
    dlr = [Attempt("apgd", "superspike:20", "dlr", steps=100, seed=1)]
    aimed = [Attempt("apgd", "superspike:20", steps=100, seed=1, wrong=rank) for rank in (0, 1)]
    other = [Attempt("sa-pgd", name, steps=100, seed=1) for name in ("adaptive", "superspike:20")]
    return [*untargeted, *dlr, *aimed, *other, *detached, Attempt("pgd", "superspike:20", steps=100, seed=1)]


def grid() -> list[Attempt]:
    """Sharpness and number of steps."""
    return [Attempt("apgd", f"superspike:{k}", steps=n) for n in (20, 100, 500) for k in (1, 3, 10, 30, 100)]


PORTFOLIOS = {"research": research, "each": each, "grid": grid}


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
        yield Network(path.name, bundle.variant("fp32"), recipe, images[:limit])
        return
    checkpoint, model = load_network(find_checkpoint(path))
    images = load_test(checkpoint.recipe.data.at(root))[:limit]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save(to_graph(simplify(model), checkpoint.shape), file)
        yield Network(path.name, file, checkpoint.recipe, images)


def attempts(network: Network, portfolio: str, out: Path) -> Iterator[dict[str, Any]]:
    """The lines of all attempts, old and new; new ones are appended to `out`."""
    bench = Laboratory(network)
    standing = bench.right(bench.x, np.arange(len(bench.y)))
    known = {"network": network.name, "sha256": bench.sha256, "n": len(bench.y), "portfolio": portfolio}
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for number, attempt in enumerate(PORTFOLIOS[portfolio]()):
        key = {**known, "attempt": attempt._asdict()}
        line = next((one for one in lines if {name: one[name] for name in key} == key), None)
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
        if portfolio == "research" or (portfolio == "each" and not number):
            standing = np.intersect1d(standing, np.array(line["left"], np.int64))
        yield line


class Laboratory:
    """One network under attack. Images are known by their places in the test set."""

    def __init__(self, network: Network) -> None:
        self._file, self.eps = network.file, network.recipe.attack.eps
        self.x, self.y = network.images.unit(), network.images.classes
        self._predict = OnnxRuntime(network.file, settings=ONE_THREAD)
        self.sha256 = sha256(network.file)
        logits = self._predict(self.x)
        logits[np.arange(len(self.y)), self.y] = -np.inf
        self._wrong = logits.argsort(1)[:, ::-1]  # wrong classes, likeliest first

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
        with GraphAttacker(self._file, attempt.surrogate, loss=attempt.loss, settings=ONE_THREAD) as attacker:
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


class Counted:
    """A GraphAttacker that counts gradients."""

    def __init__(self, target: GraphAttacker) -> None:
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
