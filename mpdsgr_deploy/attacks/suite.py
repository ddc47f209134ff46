"""What images are put through: each condition turns clean images into attacked ones, batch by batch.

The same conditions serve the torch network when it is exported and the artefact when it is validated. What is drawn for
an image depends on the seed, the condition and the image's place in the test set, on nothing else: not on the batch it
is in, on the images before it, or on which attacks ran.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.apgd import apgd
from mpdsgr_deploy.attacks.carlini_wagner import cw_l2
from mpdsgr_deploy.attacks.noise import gaussian, uniform
from mpdsgr_deploy.attacks.pgd import Keep, bim, fgsm, pgd
from mpdsgr_deploy.attacks.sa_pgd import sa_pgd
from mpdsgr_deploy.attacks.square import square
from mpdsgr_deploy.attacks.tiers import Tier
from mpdsgr_deploy.protocols import Adaptive, Array, Differentiable, Gradient, State
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.surrogates import ADAPTIVE, scaled

Floats = NDArray[np.float32]
KEPT: dict[Keep, str] = {"broken": "broken by any iterate", "worst": "the iterate of the largest loss"}
CLEAN, GAUSSIAN, UNIFORM, FGSM, BIM, PGD, STRONG = "clean", "gaussian", "uniform", "fgsm", "bim", "pgd", "pgd-strong"
SA_PGD, APGD_CE, APGD_DLR, SQUARE, CW, WORST = (
    "strong adaptive",
    "apgd-ce",
    "apgd-dlr",
    "square",
    "cw-l2",
    "worst",
)
TRANSFER = "transfer"
CW_STEPS, CW_SEARCHES = 100, 5
ADAPTING = 32  # images at a time: an adaptive surrogate remembers two numbers a neuron, step and image
# The order in which accuracy must not rise, weakest attack first.
BY_STRENGTH = (UNIFORM, FGSM, PGD, STRONG, WORST)


class Network(Protocol):
    """A network under attack: a Predictor that can be differentiated as its attackers please.

    `stochastic`: it draws noise, and gradients are averages over `draws` of it. What `attacker` and `adaptive` give
    lives as long as the with block that opens it. loss: "ce", "dlr" or "margin".
    """

    @property
    def stochastic(self) -> bool: ...

    def __call__(self, x: Floats, /) -> Floats: ...

    def attacker(self, surrogate: str, *, loss: str, draws: int) -> AbstractContextManager[Differentiable]: ...

    def adaptive(self, *, draws: int) -> AbstractContextManager[Adaptive]: ...


class Source(NamedTuple):
    """A network and the name of the surrogate it was trained with."""

    network: Network
    trained: str


class Batch(NamedTuple):
    """Images [B, C, H, W], their classes [B] and their places in the test set [B]."""

    x: Floats
    y: NDArray[np.int64]
    places: NDArray[np.int64]

    def rows(self, chosen: slice | NDArray[np.int64]) -> "Batch":
        """Some of them."""
        return Batch(self.x[chosen], self.y[chosen], self.places[chosen])


class Attacked(NamedTuple):
    """Attacked images [B, C, H, W], and what they cost together: gradients of images, or queries of a black-box attack.

    zero and not_finite count the gradients that were no use to the attack.
    """

    images: Floats
    evaluations: int = 0
    zero: int = 0
    not_finite: int = 0


class Condition(NamedTuple):
    """One condition. eps bounds how far images move; None: no bound. `open` gives the attack, for a with block.

    cost: gradients an image at most, as an estimate of its time; three queries count as one. surrogate: through which
    the network itself is differentiated; None: it is not.
    """

    name: str
    settings: str
    eps: float | None
    cost: int
    open: Callable[[], AbstractContextManager[Callable[[Batch], Attacked]]]
    surrogate: str | None = None


class Plan(NamedTuple):
    """Which attacks: strong PGD through `surrogates` beside the trained one, and of which size the others are; 0, False
    and None leave one out. l2: the radius of CW-L2.
    """

    surrogates: tuple[str, ...]
    strong_steps: int
    restarts: int = 1
    adaptive: bool = False
    apgd_steps: int = 0
    queries: int = 0
    l2: float | None = None


def required(trained: str) -> tuple[str, ...]:
    """The surrogates without which an evaluation is not believed: a quarter and 2.5 times as wide, and rectangular."""
    return (scaled(trained, 0.25), scaled(trained, 2.5), "rectangular:1")


def recipe_plan(attack: Attack) -> Plan:
    """The attacks a recipe asks for, as tables of trained networks have them."""
    return Plan(attack.surrogates, attack.strong_steps, l2=attack.l2)


def tier_plan(tier: Tier, attack: Attack, trained: str) -> Plan:
    """The attacks of a tier on a network with the surrogate `trained`."""
    names = [*required(trained), *(attack.surrogates if tier.sweep else ())]
    return Plan(
        surrogates=tuple(name for name in dict.fromkeys(names) if name != trained),
        strong_steps=attack.strong_steps,
        restarts=tier.restarts,
        adaptive=True,
        apgd_steps=tier.apgd_steps,
        queries=tier.queries,
    )


class Counter:
    """A Differentiable (or Adaptive) that passes everything through and counts gradients, useless ones apart."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.samples = self.zero = self.not_finite = 0

    def __call__(self, x: Array, y: Array) -> Gradient:
        found: Gradient = self._target(x, y)
        self._count(found)
        return found

    def start(self, count: int) -> State:
        """As of an Adaptive."""
        return self._target.start(count)

    def step(self, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        """As of an Adaptive."""
        found, moved = self._target.step(x, y, state)
        self._count(found)
        return found, moved

    def _count(self, found: Gradient) -> None:
        flat = np.asarray(found.gradient).reshape(len(found.gradient), -1)
        self.samples += len(flat)
        self.zero += int((flat == 0).all(axis=1).sum())
        self.not_finite += int((~np.isfinite(flat)).any(axis=1).sum())


class Suite:
    """The conditions of one evaluation of `network`.

    transfer: other networks, by the name of their condition, whose adversarial images are tried on this one.
    """

    def __init__(
        self,
        network: Source,
        attack: Attack,
        plan: Plan,
        *,
        seed: int,
        transfer: Mapping[str, Source] = MappingProxyType({}),
    ) -> None:
        self._source, self.network, self._attack, self._plan = network, network.network, attack, plan
        self.eps, self.strong_steps = attack.eps, plan.strong_steps
        self._seed, self._transfer = seed, transfer
        self._draws = attack.draws if self.network.stochastic else 1
        self._keep: Literal["broken", "worst"] = "worst" if self.network.stochastic else "broken"

    def conditions(self) -> Iterator[Condition]:
        """All of them, weak ones first."""
        attack, plan, eps, source = self._attack, self._plan, self._attack.eps, self._source
        std = attack.gaussian_std
        yield self._noise(GAUSSIAN, f"N(0, {std:.4g}^2)", None, lambda x, rng: gaussian(x, std=std, rng=rng))
        yield self._noise(UNIFORM, f"U(-{eps:.4g}, {eps:.4g})", eps, lambda x, rng: uniform(x, eps=eps, rng=rng))
        yield self.fgsm(eps)
        yield self._paper(BIM, source, random=False)
        yield self._paper(PGD, source)
        for name, other in self._transfer.items():
            yield self._paper(name, other)
        yield self.strong(STRONG, source.trained, restarts=plan.restarts)
        for surrogate in plan.surrogates:
            yield self.strong(f"strong {surrogate}", surrogate)
        if plan.adaptive:
            yield self._sa_pgd()
        if plan.apgd_steps:
            yield self._apgd(APGD_CE, "ce")
            yield self._apgd(APGD_DLR, "dlr")
        if plan.queries:
            yield self._square()
        if plan.l2 is not None:
            yield self._cw(plan.l2)

    def fgsm(self, eps: float) -> Condition:
        """One step of size eps."""
        return self._gradient(FGSM, f"eps {eps:.4g}", eps, 1, self._source, lambda t, b: fgsm(t, b.x, b.y, eps=eps))

    def strong(
        self, name: str, surrogate: str, *, eps: float | None = None, steps: int | None = None, restarts: int = 1
    ) -> Condition:
        """The strong PGD through a surrogate: step eps/4, every iterate counts. eps, steps: others than the plan's."""
        eps, steps = eps or self._attack.eps, steps or self._plan.strong_steps

        def run(target: Differentiable, batch: Batch) -> Floats:
            return pgd(
                target,
                batch.x,
                batch.y,
                eps=eps,
                step=eps / 4,
                steps=steps,
                draw=self._starts(name, batch),
                keep=self._keep,
                restarts=restarts,
            )

        begun = "random start" if restarts == 1 else f"{restarts} random starts"
        settings = f"eps {eps:.4g}, {steps} steps of eps/4, {begun}, {KEPT[self._keep]}"
        source = self._source._replace(trained=surrogate)
        return self._gradient(name, settings, eps, (steps + 1) * restarts, source, run)

    def _paper(self, name: str, source: Source, *, random: bool = True) -> Condition:
        """PGD as the paper has it: few steps, the last iterate."""
        eps, steps, step = self._attack.eps, self._attack.steps, self._attack.step

        def run(target: Differentiable, batch: Batch) -> Floats:
            if not random:
                return bim(target, batch.x, batch.y, eps=eps, step=step, steps=steps)
            return pgd(target, batch.x, batch.y, eps=eps, step=step, steps=steps, draw=self._starts(name, batch))

        start = ", random start" if random else ""
        settings = f"eps {eps:.4g}, {steps} steps of {step:.4g}{start}, last iterate"
        return self._gradient(name, settings, eps, steps, source, run)

    def _sa_pgd(self) -> Condition:
        eps = self._attack.eps
        steps = self._plan.apgd_steps or self._plan.strong_steps  # it goes on gaining where PGD has long stood still

        def part(counted: Counter, batch: Batch) -> Floats:
            drawn = self._starts(SA_PGD, batch)
            return sa_pgd(counted, batch.x, batch.y, eps=eps, steps=steps, draw=drawn, keep=self._keep)

        def run(counted: Counter, batch: Batch) -> Floats:
            cuts = [slice(start, start + ADAPTING) for start in range(0, len(batch.y), ADAPTING)]
            return np.concatenate([part(counted, batch.rows(cut)) for cut in cuts])

        opened = self._opened(self.network, lambda: self.network.adaptive(draws=self._draws), run)
        settings = f"SA-PGD, eps {eps:.4g}, {steps} steps, surrogates as wide as each neuron's potentials are spread"
        return Condition(SA_PGD, settings, eps, steps + 1, opened, ADAPTIVE)

    def _apgd(self, name: str, loss: str) -> Condition:
        eps, steps = self._attack.eps, self._plan.apgd_steps

        def run(target: Differentiable, batch: Batch) -> Floats:
            drawn = self._starts(name, batch)
            return apgd(target, batch.x, batch.y, eps=eps, steps=steps, draw=drawn, keep=self._keep)

        settings = f"eps {eps:.4g}, {steps} steps of adaptive size on the {loss.upper()} loss"
        return self._gradient(name, settings, eps, steps + 1, self._source, run, loss=loss)

    def _square(self) -> Condition:
        eps, queries = self._attack.eps, self._plan.queries

        def attack(batch: Batch) -> Attacked:
            found = square(
                self.network, batch.x, batch.y, eps=eps, queries=queries, seed=self._seed, indices=batch.places
            )
            return Attacked(found.images, int(found.queries.sum()))

        settings = f"eps {eps:.4g}, at most {queries} queries an image, no gradients"
        return Condition(SQUARE, settings, eps, queries // 3, lambda: nullcontext(attack))

    def _cw(self, radius: float) -> Condition:
        def run(target: Differentiable, batch: Batch) -> Floats:
            found = cw_l2(target, batch.x, batch.y, steps=CW_STEPS, searches=CW_SEARCHES)
            within = np.sqrt(((found - batch.x) ** 2).sum((1, 2, 3), keepdims=True)) <= radius
            return np.where(within, found, batch.x)

        settings = f"CW-L2 within an L2 distance of {radius:.4g}"
        return self._gradient(CW, settings, None, CW_STEPS * CW_SEARCHES, self._source, run, loss="margin")

    def _gradient(
        self,
        name: str,
        settings: str,
        eps: float | None,
        cost: int,
        source: Source,
        run: Callable[[Differentiable, Batch], Floats],
        *,
        loss: str = "ce",
    ) -> Condition:
        """An attack that follows the gradient of `source` through the surrogate named there."""

        opened = self._opened(
            source.network, lambda: source.network.attacker(source.trained, loss=loss, draws=self._draws), run
        )
        own = source.trained if source.network is self.network else None
        return Condition(name, settings, eps, cost * self._draws, opened, own)

    def _opened(
        self, network: Network, target: Callable[[], AbstractContextManager[Any]], run: Callable[[Any, Batch], Floats]
    ) -> Callable[[], AbstractContextManager[Callable[[Batch], Attacked]]]:
        """What opens an attack that `run`s on a `target` of the network.

        That of a stochastic network is opened anew for every batch, which then meets the same noise whatever came
        before it: a batch gives what it gave before a kill.
        """

        def once(batch: Batch) -> Attacked:
            with target() as found:
                return self._counted(found, lambda counted: run(counted, batch))

        @contextmanager
        def kept() -> Iterator[Callable[[Batch], Attacked]]:
            with target() as found:
                yield lambda batch: self._counted(found, lambda counted: run(counted, batch))

        return (lambda: nullcontext(once)) if network.stochastic else kept

    def _counted(self, target: Differentiable | Adaptive, run: Callable[[Counter], Floats]) -> Attacked:
        counter = Counter(target)
        images = run(counter)
        return Attacked(images, counter.samples * self._draws, counter.zero, counter.not_finite)

    def _noise(
        self, name: str, settings: str, eps: float | None, perturb: Callable[[Floats, np.random.Generator], Floats]
    ) -> Condition:
        def attack(batch: Batch) -> Attacked:
            pairs = zip(batch.x, self._generators(name, batch), strict=True)
            return Attacked(np.stack([perturb(image, rng) for image, rng in pairs]))

        return Condition(name, settings, eps, 0, lambda: nullcontext(attack))

    def _starts(self, name: str, batch: Batch) -> Callable[[tuple[int, ...]], Floats]:
        """U(-1, 1) per pixel, each image's own, as `pgd` draws it."""
        rngs = self._generators(name, batch)
        return lambda shape: np.stack([rng.uniform(-1, 1, shape[1:]) for rng in rngs]).astype(np.float32)

    def _generators(self, name: str, batch: Batch) -> list[np.random.Generator]:
        return [np.random.default_rng((self._seed, place, *name.encode())) for place in batch.places.tolist()]
