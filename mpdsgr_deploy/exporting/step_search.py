"""Choose the number of time steps: attack a network at fewer steps than it has, and find how few suffice."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import ceil, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy import __version__
from mpdsgr_deploy.address import cache_directory
from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.attack_graph.attacker import NetworkFile
from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.attacks.promise import promise
from mpdsgr_deploy.attacks.resumable_run import Journal
from mpdsgr_deploy.attacks.tiers import suite_of
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
from mpdsgr_deploy.exporting.precision import convert, plan
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.manifest import NoiseInput
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import simplify
from mpdsgr_deploy.models.spiking_net import Shape
from mpdsgr_deploy.models.time_steps import first_steps
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import images_sha256
from mpdsgr_deploy.runtime import NoiseSource, OnnxRuntime, predict
from mpdsgr_deploy.runtime.torch_model import noise_inputs

TIER = "commit"  # how hard every number of steps is attacked
Z = 1.6449  # the 95 % quantile of the normal distribution: one-sided tests at 5 %
Bools = NDArray[np.bool_]


class StepFile(NamedTuple):
    """The ONNX file of a network's first steps in one precision, its recipe and the noise it draws."""

    file: Path
    recipe: Recipe
    noise: tuple[NoiseInput, ...]

    def attacked(self, images: Images, of: str, unfinished: Path) -> Mapping[str, Bools]:
        """Return verdicts [n], True for images that stay right: "clean", per attack of tier `commit`, and "worst".

        of: the name of the network in progress bars. unfinished: a directory of this network, in which verdicts are
        stored, so that no attack is repeated after an interruption.
        """
        size, seed = self.recipe.validation.batch_size, self.recipe.validation.seed
        journal = Journal(unfinished, sha256(self.file))
        with OnnxRuntime(self.file, noise=NoiseSource(self.noise, seed)) as predictor:
            network = NetworkFile(self.file, predictor, self.noise, seed)
            logits = predict(predictor, images.unit(), size, of)
            journal.begin(logits)
            if (before := journal.verdicts()) is not None:
                return before
            verdicts = promise(network, self.recipe, images, TIER, logits, of=of, journal=journal)[1].verdicts
        journal.finish(verdicts)
        return verdicts


@contextmanager
def unfinished_attacks(network: str, images: Images) -> Iterator[Path]:
    """Provide a directory in the user's cache, locked for a with block, and delete it unless the block raises.

    network: together with the images, identifies the directory. Raises InputError if it cannot be written.
    """
    subject = json.dumps([__version__, suite_of(TIER), TIER, network, images_sha256(images)])
    place = cache_directory() / "steps" / hashlib.sha256(subject.encode()).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror}; name another place in MPDSGR_CACHE") from error
    with exclusive(place / LOCK, "process"):
        yield place
        shutil.rmtree(place, ignore_errors=True)


def step_files(
    model: SpikingNet, recipe: Recipe, shape: Shape, steps: int, variants: Mapping[str, Mapping[str, str]], folder: Path
) -> dict[str, StepFile]:
    """Write the network of the first `steps` in every precision of `variants`, and return the files by precision.

    variants: for each precision, the precision of each layer's product; {}: that of `precision.plan`.

    Raises InputError as `first_steps` does.
    """
    shortened, shortened_recipe = first_steps(model, recipe, shape, steps)
    graph, files = to_graph(simplify(shortened), shape), {}
    for precision, layers in variants.items():
        file = folder / f"{precision}-{steps}.onnx"
        save(convert(graph, layers or plan(graph, precision)), file)
        files[precision] = StepFile(file, shortened_recipe, noise_inputs(shortened, shape))
    return files


class Flips(NamedTuple):
    """Paired verdicts on n images: right at all T steps and wrong at fewer (lost), and the reverse (regained)."""

    lost: int
    regained: int
    n: int

    @classmethod
    def of(cls, full: Bools, fewer: Bools) -> "Flips":
        return cls(int((full & ~fewer).sum()), int((~full & fewer).sum()), len(full))

    def rule_out(self, drop: float) -> bool:
        """Whether the verdicts refute, at the one-sided 5 % level, a fall in accuracy by `drop` or more; 0 < drop < 1.

        This is the score test for a difference of paired proportions (Tango, Statistics in Medicine 17, 1998).
        """
        lost, regained, n = self
        b = 2 * n * drop - (lost + regained) - (lost - regained) * drop
        # the estimated share of regained images if accuracy falls by exactly `drop`
        share = (sqrt(b * b + 8 * n * regained * drop * (1 - drop)) - b) / (4 * n)
        return lost - regained - n * drop <= -Z * sqrt(n * (2 * share + drop * (1 - drop)))


def least_images(drop: float) -> int:
    """Return how many images are needed to refute a fall in accuracy by `drop` if no verdict flips; 0 < drop < 1."""
    return ceil(Z * Z * (1 - drop) / drop)


def fewest_steps(
    model: SpikingNet, recipe: Recipe, shape: Shape, images: Images, max_drop: float
) -> tuple[int, dict[str, Any]]:
    """Return the fewest time steps that keep clean and attacked accuracy of the float32 network, and a JSON record.

    images: validation images, never those that the result is reported on. Fewer and fewer steps are tried, from T - 1
    down, until a drop of `max_drop` (0 < max_drop < 1) or more can no longer be ruled out, on clean images or under all
    attacks of tier `commit`. The chosen number therefore loses more with a probability of at most 5 %: both tests must
    succeed, and none is made after one that failed. The record lists the flips at every number that was tried.

    After an interruption the same call continues with the remaining attacks. Raises InputError for a max_drop out of
    range, for too few images, and if the user's cache cannot be written.
    """
    T, n = recipe.encoding.T, len(images)
    if not 0 < max_drop < 1:
        raise InputError(
            "--steps auto needs a --max-drop between 0 and 1, because no number of images rules out every drop"
        )
    if n < least_images(max_drop):
        raise InputError(
            f"to rule out a drop of {max_drop:.2%} takes {least_images(max_drop)} validation images, and there "
            f"are {n}; raise --max-drop, or give a number to --steps"
        )

    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))

        def file(steps: int) -> StepFile:
            return step_files(model, recipe, shape, steps, {"fp32": {}}, folder)["fp32"]

        whole = file(T)
        place = stack.enter_context(unfinished_attacks(sha256(whole.file) + recipe.model_dump_json(), images))
        full, chosen, tried = whole.attacked(images, f"{T} of {T} steps", place / str(T)), T, list[dict[str, Any]]()
        for steps in range(T - 1, 0, -1):
            fewer = file(steps).attacked(images, f"{steps} of {T} steps", place / str(steps))
            flips = {condition: Flips.of(full[condition], fewer[condition]) for condition in (CLEAN, WORST)}
            within = all(pair.rule_out(max_drop) for pair in flips.values())
            counts = ", ".join(f"{name} {pair.lost} lost, {pair.regained} regained" for name, pair in flips.items())
            log.info("%d of %d steps %s: of %d images %s", steps, T, "suffice" if within else "are too few", n, counts)
            tried.append({"steps": steps, "within": within} | {name: pair._asdict() for name, pair in flips.items()})
            if not within:
                break
            chosen = steps
    return chosen, {"max_drop": max_drop, "images": f"{n} validation images of {recipe.data.name}", "tried": tried}
