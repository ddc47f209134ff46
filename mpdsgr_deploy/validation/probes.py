"""Attack some of the images further, for health checks and figures: growing eps, twice the steps, random search."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.blind import Square
from mpdsgr_deploy.attacks.condition import FGSM, STRONG, WORST, Classes, Condition, Floats
from mpdsgr_deploy.attacks.resumable_run import gather, run
from mpdsgr_deploy.attacks.suite_measurement import Measurement, Outcome
from mpdsgr_deploy.attacks.targets import best_wrong
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.validation.health.check_registry import Convergence, Search, Slopes
from mpdsgr_deploy.validation.subject import Subject

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # as multiples of the recipe's eps
GROWTH_STEPS = 20  # steps of the strong PGD
LARGE = (0.5, 1.0)  # within eps 0.5 an attack can make every image grey, within 1 it can make any image
STEPS = (0.125, 0.25, 0.5, 1.0)  # lengths of steps along the gradient and along random directions, as shares of eps
DIRECTIONS = 4  # number of random directions
SEARCHED = 100  # number of images on which random search is tried
ENOUGH = 500  # queries per image that random search needs to reveal a weakened gradient
CERTAIN = 1e-6  # a smaller cross-entropy has no gradient in float32, where 1 - p rounds to 0

Bools = NDArray[np.bool_]


def growth(subject: Subject, measurement: Measurement, x: Floats) -> dict[str, dict[float, Bools]]:
    """Return the verdicts on the first m images x [m, C, H, W] by attack (FGSM, strong PGD) and by eps, from 0 to 1."""
    y, clean = measurement.y[: len(x)], measurement.clean[: len(x)]
    fgsm, strong = (next(c for c in subject.suite.conditions if c.name == name) for name in (FGSM, STRONG))
    quick = {FGSM: fgsm, STRONG: replace(strong, steps=GROWTH_STEPS, restarts=1)}
    eps = fgsm.bound
    radii = sorted({round(multiple * eps, 9) for multiple in MULTIPLES if multiple * eps < 1} | set(LARGE))
    correct_by_eps: dict[str, dict[float, Bools]] = {name: {0.0: clean == y} for name in quick}
    for radius in track(radii, "growing eps"):
        for name, attack in quick.items():
            grown = replace(attack, name=f"{name} at {radius:g}", eps=radius, stream=name)
            correct_by_eps[name][radius] = withstood(subject, grown, x, y, clean)
    return correct_by_eps


def withstood(subject: Subject, attack: Condition, x: Floats, y: Classes, clean: Classes) -> Bools:
    """Return the verdicts [m] on images x [m, C, H, W] of classes y [m] under an attack.

    clean [m]: the predictions without attack. Images that these say are misclassified are not attacked.
    """
    batches = run(subject.suite, attack, x, y, clean, batch_size=subject.batch_size, journal=subject.journal)
    return gather(list(batches))[1] == y


def convergence(subject: Subject, measurement: Measurement, x: Floats) -> Convergence:
    """Repeat every attack that the worst case rests on with twice the steps, on the first m images x [m, C, H, W].

    Each attack is made from its first random start, on the images that all attacks so far left correct.
    """
    m = len(x)
    y, clean = measurement.y[:m], measurement.clean[:m]
    standing = measurement.standing[:m].copy()
    survived, longer = int(standing.sum()), {}
    for condition in contributing(measurement.outcomes, measurement.clean == measurement.y):
        steps = 2 * condition.steps
        more = replace(
            condition, name=f"{condition.name} {steps} steps", steps=steps, restarts=1, stream=condition.name
        )
        longer[condition.name] = condition.steps
        attackable = np.where(standing, clean, -1)  # images that are already broken count as misclassified
        standing &= withstood(subject, more, x, y, attackable)
    worst, floor = float(measurement.standing.mean()), subject.gate.floors.get(WORST)
    return Convergence(survived - int(standing.sum()), survived, m, longer, worst, floor)


def contributing(outcomes: Sequence[Outcome], right: Bools) -> list[Condition]:
    """Return the attacks with many steps that the worst case rests on: the strongest, and those alone in breaking one.

    right [n]: whether an image is classified correctly without attack.
    """
    attacks = [o for o in outcomes if o.condition.kind == "gradient" and o.condition.eps and o.condition.steps > 1]
    strong = [o for o in attacks if o.condition.rank is None or o.condition.name == STRONG]
    if not strong:
        return []
    breaks = np.array([right & ~o.correct for o in outcomes if o.condition.eps is not None])
    alone = {o.condition.name for o in strong if (right & ~o.correct & (breaks.sum(0) == 1)).any()}
    strongest = min(strong, key=lambda o: o.correct.mean())
    return [o.condition for o in strong if o.condition.name in alone or o is strongest]


def search(subject: Subject, measurement: Measurement, x: Floats) -> Search | None:
    """Try Square on those of the first m images x [m, C, H, W] that no attack with a gradient broke.

    Square has ENOUGH queries, or the tier's number if that is larger. None if the tier has no Square, and for a
    stochastic network, whose noise alone breaks images if queries are repeated often enough.
    """
    square = next((c for c in subject.suite.conditions if isinstance(c, Square)), None)
    if square is None or subject.suite.network.stochastic:
        return None
    m, queries = len(x), max(square.queries, ENOUGH)
    y, clean = measurement.y[:m], measurement.clean[:m]
    within = [o for o in measurement.outcomes if o.condition.eps is not None]
    unbroken = np.logical_and.reduce([clean == y, *(o.correct[:m] for o in within if o.condition.kind == "gradient")])
    broken = unbroken & ~np.logical_and.reduce([o.correct[:m] for o in within if o.condition.kind == "query"])
    if queries > square.queries:
        longer = replace(square, name=f"{square.name} {queries} queries", queries=queries, stream=square.name)
        attackable = np.where(unbroken & ~broken, clean, -1)
        broken |= unbroken & ~withstood(subject, longer, x, y, attackable)
    return Search(int(broken.sum()), int(unbroken.sum()), m, queries)


def slopes(subject: Subject, measurement: Measurement, x: Floats) -> Slopes | None:
    """Measure how the loss changes along the signs of its gradient, and along random signs.

    The loss is computed from the network's logits alone. It is the cross-entropy, or, for images of which the network
    is so certain that the gradient of the cross-entropy underflows in float32, the margin: the best wrong logit minus
    the true one. Only those of the first images x [m, C, H, W] that are classified correctly are used. None if there
    are none, and for a stochastic network, whose noise changes logits more than small steps do.
    """
    network, size = subject.suite.network, subject.batch_size
    chosen = np.flatnonzero(measurement.clean[: len(x)] == measurement.y[: len(x)])
    if network.stochastic or not len(chosen):
        return None
    x, y = x[chosen], measurement.y[chosen]
    parts = [slice(start, start + size) for start in range(0, len(x), size)]

    def answers(images: Floats) -> Floats:
        return np.concatenate([network(images[part]) for part in parts])

    def gradient(loss: str, towards: NDArray[Any]) -> Floats:
        with network.attacker(subject.suite.source.trained, loss=loss, draws=1) as target:
            return np.concatenate([np.asarray(target(x[part], towards[part]).gradient) for part in parts])

    logits, uphill = answers(x), np.sign(gradient("ce", y))
    margins = best_wrong(logits, y).weights
    certain = cross_entropy(logits, y) < CERTAIN
    if certain.any():
        uphill[certain] = np.sign(gradient("weighted", margins))[certain]

    def loss(logits: Floats) -> Floats:
        return np.where(certain, (margins * logits).sum(axis=1, dtype=np.float64), cross_entropy(logits, y))

    rng = np.random.default_rng(0)
    random = [rng.choice(np.array([-1, 1], np.float32), x.shape) for _ in range(DIRECTIONS)]
    before = loss(logits)
    rises, further = {}, np.zeros(len(x))
    for step in (share * subject.target.bundle.manifest.recipe.attack.eps for share in STEPS):

        def rise(direction: Floats, step: float = step) -> Floats:
            return loss(answers(np.clip(x + np.float32(step) * direction, 0, 1))) - before

        along, randomly = rise(uphill), np.mean([rise(direction) for direction in random], axis=0)
        rises[step] = (float(along.mean()), float(randomly.mean()))
        further += along - randomly
    return Slopes(int((further > 0).sum()), len(x), rises)


def cross_entropy(logits: Floats, y: Classes) -> Floats:
    """Return the cross-entropy [m] of logits [m, K] and classes y [m]."""
    logits = logits.astype(np.float64)
    largest = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    return np.asarray(total - logits[np.arange(len(y)), y])
