"""MPD-APGD: adaptive steps through surrogates whose tails cover the whole distribution of membrane potentials (MPD).

    dO/dU = 1 / (1 + k |U - V_th|)^2        with a sharpness k per round

The surrogate used in training is zero outside a window around the threshold. A silent neuron far below the threshold
therefore has no gradient, and an attack cannot make it spike. A tail that falls with the square of the distance gives
every neuron a gradient, which is weaker the further its potential lies from V_th. Using it takes many small steps: a
large fixed step moves pixels past the threshold crossings that the gradient predicts.

No single choice of the following is best for all images, so rounds differ in them: the step of SA-PGD (momentum and a
size per pixel) or of APGD (a size per image, halved when the loss stops rising), the sharpness, the loss, and the class
aimed at. Short rounds come first. How much they lower an image's margin predicts whether it can be broken at all; only
promising images get the long rounds, which cost most of the gradients. See benchmarks/MPD_APGD.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from array_api_compat import array_namespace, device

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.condition import Batch, Floats, Kind, Network, register
from mpdsgr_deploy.attacks.conditions import GradientAttack
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.pgd import Draw, fixed, wide
from mpdsgr_deploy.attacks.sa_pgd import sa_pgd
from mpdsgr_deploy.attacks.targets import likeliest_wrong
from mpdsgr_deploy.protocols import Array, Differentiable, Gradient, State
from mpdsgr_deploy.recipe import Attack

HEAVY_TAILED = "superspike"  # 1 / (1 + k |U - V_th|)^2
FIRST_STEP = 0.5  # first step size of APGD, in units of eps


class Through(NamedTuple):
    """A way to differentiate the network: the sharpness k of the surrogate superspike:k, and the loss."""

    sharpness: float
    loss: Literal["ce", "dlr"] = "ce"


class Round(NamedTuple):
    """One attack from a random start.

    climb: the attack. length: its number of steps, in units of the attack's `steps`. near: an image takes part in the
    following rounds if the smallest margin reached so far is at most this share of its margin without attack. aim: the
    rank of the wrong class whose loss is minimised, by the logits without attack (0: the likeliest); None: the loss of
    the true class is maximised.
    """

    climb: Literal["sa-pgd", "apgd"]
    through: Through
    length: int
    near: float
    aim: int | None = None


Schedule = tuple[Round, ...]
QUICK: Schedule = (
    Round("sa-pgd", Through(20), 1, near=0.4),
    Round("apgd", Through(10, "dlr"), 1, near=0.25),
)
SCHEDULE: Schedule = (
    Round("sa-pgd", Through(20), 1, near=0.6),
    Round("apgd", Through(10, "dlr"), 1, near=0.4),
    Round("apgd", Through(20), 1, near=0.3, aim=1),
    Round("apgd", Through(20), 3, near=0.2),
    Round("apgd", Through(20), 3, near=0.12, aim=1),
    Round("apgd", Through(30), 9, near=0.05),
    Round("apgd", Through(20), 9, near=0.04),
    Round("apgd", Through(20), 9, near=0.04, aim=0),
    Round("apgd", Through(20), 9, near=0.04, aim=1),
)
TRANSFERRED: Schedule = (*QUICK, Round("apgd", Through(20), 1, near=0.25, aim=1))


def mpd_apgd(
    targets: Mapping[Through, Differentiable],
    x: Array,
    y: Array,
    *,
    eps: float,
    steps: int = 100,
    schedule: Sequence[Round] = SCHEDULE,
    draw: Draw | None = None,
    keep: Literal["broken", "worst"] = "broken",
) -> Array:
    """Return adversarial images for x [B, C, H, W] in [0, 1] with classes y [B], by the rounds of a schedule in turn.

    targets: the same network, differentiated in every way that the schedule names. draw: see `pgd`; every round has its
    own random start. keep: "broken" drops an image from the batch as soon as it fools a target; "worst", for stochastic
    targets, continues with it. In both cases, images whose margin stays too large leave the batch (see `Round.near`),
    and each image's result is the one of the smallest margin among the results of its rounds.

    An image costs at most `gradients(steps, schedule)` gradients. All starts are drawn in advance, so an image's result
    does not depend on the other images. A network with one class cannot be fooled, so x is returned unchanged. Raises
    KeyError if `targets` lacks a way of differentiating.
    """
    xp = array_namespace(x)
    offsets = [None if draw is None else draw(x.shape) for _ in schedule]
    adversarial = xp.asarray(x, copy=True)
    logits, _, _ = targets[schedule[0].through](x, y)
    if logits.shape[1] == 1:
        return adversarial
    clean, wrong = _margin(xp, logits, y), likeliest_wrong(logits, y)
    smallest, active = xp.asarray(clean, copy=True), xp.arange(x.shape[0], device=device(x))
    for turn, offset in zip(schedule, offsets, strict=True):
        if not active.shape[0]:
            break
        aims = None if turn.aim is None else wrong[active, min(turn.aim, wrong.shape[1] - 1)]
        start = fixed(offset, active)
        attempt = _climb(xp, turn, targets[turn.through], x[active], y[active], aims, eps, steps, start, keep)
        logits, _, _ = targets[turn.through](attempt, y[active])
        margin = _margin(xp, logits, y[active])
        nearer, standing = margin < smallest[active], xp.argmax(logits, axis=1) == y[active]
        adversarial[active] = xp.where(wide(nearer | ~standing), attempt, adversarial[active])
        smallest[active] = xp.where(nearer, margin, smallest[active])
        hopeful = smallest[active] <= turn.near * clean[active]
        active = active[hopeful & standing] if keep == "broken" else active[hopeful]
    return adversarial


def gradients(steps: int, schedule: Sequence[Round] = SCHEDULE) -> int:
    """Return the most gradients per image: one for x, and for each round those of its attack and one for its result."""
    return 1 + sum(steps * turn.length + 2 for turn in schedule)


def _climb(
    xp: Array,
    turn: Round,
    target: Differentiable,
    x: Array,
    y: Array,
    aims: Array | None,
    eps: float,
    steps: int,
    start: Draw | None,
    keep: Literal["broken", "worst"],
) -> Array:
    """Attack images x of classes y in one round. aims [B]: the wrong classes aimed at; None: the round aims at none."""
    classes, climbed = (y, target) if aims is None else (xp.stack([y, aims], axis=1), _towards(target))
    length = steps * turn.length
    if turn.climb == "apgd":
        return apgd(climbed, x, classes, eps=eps, steps=length, step=FIRST_STEP * eps, draw=start, keep=keep)
    return sa_pgd(Still(climbed), x, classes, eps=eps, steps=length, draw=start, keep=keep)


def _margin(xp: Array, logits: Array, y: Array) -> Array:
    """Return the true logit minus the largest wrong one [B], for logits [B, K] with K >= 2."""
    true = y[:, None] == xp.arange(logits.shape[1], device=device(logits))[None, :]
    best_wrong = xp.max(xp.where(true, -xp.inf, logits), axis=1)
    return xp.sum(xp.where(true, logits, xp.zeros_like(logits)), axis=1) - best_wrong


def _towards(target: Differentiable) -> Differentiable:
    """Return a Differentiable for pairs [B, 2], whose loss is minus the loss of the second class."""

    def negated(x: Array, pairs: Array) -> Gradient:
        logits, loss, gradient = target(x, pairs[:, 1])
        return Gradient(logits, -loss, -gradient)

    return negated


class Still:
    """Wrap a Differentiable as an Adaptive without a state: its surrogates do not adapt."""

    def __init__(self, target: Differentiable) -> None:
        self._target = target

    def start(self, count: int) -> State:
        return {}

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        return self._target(x, y), state


@register
@dataclass(frozen=True, kw_only=True)
class MPDAutoPGD(GradientAttack):
    """`mpd_apgd` with a schedule: rounds of adaptive steps on images that are still classified correctly."""

    method: ClassVar[str] = "mpd-apgd"

    steps: int = 100
    schedule: Schedule = SCHEDULE

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": attack.eps, "surrogate": HEAVY_TAILED}

    @property
    def settings(self) -> str:
        lengths = ", ".join(str(turn.length * self.steps) for turn in self.schedule)
        names = ", ".join(f"{k:g}" for k in sorted({turn.through.sharpness for turn in self.schedule}))
        losses = " and ".join(sorted({turn.through.loss.upper() for turn in self.schedule}))
        return (
            f"MPD-APGD, eps {self.eps:.4g}, rounds of {lengths} adaptive steps on the {losses} losses through "
            f"{self.surrogate} of sharpness {names}, the later ones on images that came near the boundary"
        )

    @property
    def cost(self) -> int:
        return gradients(self.steps, self.schedule) * self.draws

    @contextmanager
    def target(self, network: Network) -> Iterator[Mapping[Through, Differentiable]]:
        with ExitStack() as stack:
            yield {
                way: stack.enter_context(
                    network.attacker(f"{self.surrogate}:{way.sharpness:g}", loss=way.loss, draws=self.draws)
                )
                for way in dict.fromkeys(turn.through for turn in self.schedule)
            }

    def counted(
        self, target: Mapping[Through, Differentiable], counts: GradientCounts
    ) -> dict[Through, CountedGradients]:
        return {way: CountedGradients(one, counts) for way, one in target.items()}

    def climb(self, target: Mapping[Through, CountedGradients], batch: Batch, draw: Draw) -> Floats:
        return mpd_apgd(
            target,
            batch.x,
            batch.y,
            eps=self.bound,
            steps=self.steps,
            schedule=self.schedule,
            draw=draw,
            keep=self.kept,
        )


@register
@dataclass(frozen=True, kw_only=True)
class StrongTransfer(MPDAutoPGD):
    """MPD-APGD on another network, chosen by the caller, whose attacked images are tested on the one under evaluation.

    A network of the caller's own reveals robustness that is only apparent because gradients of this one mislead.
    """

    method: ClassVar[str] = "transfer-strong"
    kind: ClassVar[Kind] = "transfer"

    schedule: Schedule = TRANSFERRED

    @property
    def settings(self) -> str:
        return f"{super().settings}, on the other network"
