"""Health checks by number: registered with a name, what they need, why they matter and what to do if one fails.

A check is a function whose parameters name parts of the `Evidence`; it runs wherever all of them are available. One
that failed makes the verdict invalid, never a pass.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from types import MappingProxyType
from typing import Literal, NamedTuple, ParamSpec

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, computed_field

from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.validation.rows import VerdictFlips

P = ParamSpec("P")
Bools = NDArray[np.bool_]
Verdicts = Mapping[str, Bools]
State = Literal["passed", "failed", "not compared"]


class Seen(NamedTuple):
    """The result of a check: `faults` in words, none if it passed, and what it found in order.

    not_compared: there was nothing to hold this against, which is neither good nor bad.
    """

    faults: Sequence[str]
    otherwise: str
    not_compared: bool = False


class Check(BaseModel):
    """One health check: its result, why it matters, and what to do if it failed."""

    number: int
    name: str
    state: State
    saw: str
    why: str
    advice: str

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return self.state == "passed"

    @property
    def failed(self) -> bool:
        return self.state == "failed"


class Convergence(NamedTuple):
    """The effect of twice the steps: of n images, `standing` survived all attacks, of which `broken` were now broken.

    attacks: the prolonged ones, with their original steps. worst: the accuracy in the worst case, over all images of
    the evaluation, in [0, 1]. floor: what the gate requires of it, None for nothing.
    """

    broken: int
    standing: int
    n: int
    attacks: Mapping[str, int]
    worst: float
    floor: float | None = None


class Compared(NamedTuple):
    """What the verdict rests on. reference: whether there is one for these images; floors: whether the gate has any."""

    reference: bool
    floors: bool


class Reach(NamedTuple):
    """The worst case of artefact and reference over the attacks that both met.

    reference: whether there is one for these images. flips: None if no attack was met by both. missing: attacks that
    the reference should have met but has not; alone: those that only the artefact met. allowed: change of accuracy that
    the gate allows, in [0, 1]. each: the flips under every attack that both met. contradictions: images that the
    reference counts as right in the worst case and as broken by one of its attacks.
    """

    reference: bool
    flips: VerdictFlips | None = None
    missing: Sequence[str] = ()
    alone: Sequence[str] = ()
    allowed: float = 0.0
    contradictions: int = 0
    each: Mapping[str, VerdictFlips] = MappingProxyType({})


class Slopes(NamedTuple):
    """The rise of the loss along the gradient and along random directions, computed from the network's answers alone.

    steeper: of n images, those whose loss rises further along the gradient. rises: by step size, the mean rise of the
    loss along the gradient and along random directions.
    """

    steeper: int
    n: int
    rises: Mapping[float, tuple[float, float]]


class Search(NamedTuple):
    """The result of random search on the images that no attack with a gradient broke.

    broken: of n images, those it broke; standing: those it was tried on. queries: the number per image.
    """

    broken: int
    standing: int
    n: int
    queries: int


class Rebuilt(NamedTuple):
    """Files of the bundle that differ from a new export of its weights, or why it cannot be exported here."""

    faults: Sequence[str] = ()
    unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence that checks examine. None: not available in this evaluation, so checks that need it do not run.

    rule: which images, in words; budget_faults: how attacked images break the rules; verdicts: of a measurement that
    did not stop early; black_box, white_box: names of conditions by what they know; gradients: how many were computed
    through the trained surrogate, how many vanished, how many were not finite; artefact, fresh: the network here and in
    a new process; batch_sizes: the recipe's, and the largest of every engine; rounded_outputs: whether the file rounds
    its logits to 8 bits; not_finite: by condition the numbers of images whose logits are not finite.
    """

    rule: str
    n: int
    compared: Compared | None = None
    reach: Reach | None = None
    budget_faults: Sequence[str] | None = None
    verdicts: Verdicts | None = None
    black_box: Sequence[str] | None = None
    white_box: Sequence[str] | None = None
    growth: Mapping[float, Bools] | None = None
    convergence: Convergence | None = None
    surrogates: Sequence[str | None] | None = None
    trained: str | None = None
    gradients: tuple[int, int, int] | None = None
    artefact: Predictor | None = None
    fresh: Predictor | None = None
    x: NDArray[np.float32] | None = None
    batch_sizes: Sequence[int] | None = None
    logits: NDArray[np.float32] | None = None
    rounded_outputs: bool = False
    image_faults: Sequence[str] | None = None
    classes: NDArray[np.int64] | None = None
    labels: Sequence[str] | None = None
    slopes: Slopes | None = None
    search: Search | None = None
    foreign: Sequence[str] | None = None
    rebuilt: Rebuilt | None = None
    not_finite: Mapping[str, Sequence[int]] | None = None


class Registered(NamedTuple):
    """A registered check. needs: the parts of the evidence that it requires; may_use: those that are optional."""

    number: int
    name: str
    needs: tuple[str, ...]
    may_use: tuple[str, ...]
    make: Callable[..., Check]


CHECKS: dict[int, Registered] = {}


def health_check(number: int, name: str, *, why: str, advice: str) -> Callable[[Callable[P, Seen]], Callable[P, Check]]:
    """Decorator: register a function of parts of the evidence as the check of that number, which must be free."""

    def register(look: Callable[P, Seen]) -> Callable[P, Check]:
        parameters = inspect.signature(look).parameters
        known = {field.name for field in fields(Evidence)}
        assert number not in CHECKS, f"check {number} is registered twice"
        assert set(parameters) <= known, f"check {number} needs {set(parameters) - known}, which no evidence has"

        @wraps(look)
        def make(*args: P.args, **kwargs: P.kwargs) -> Check:
            seen = look(*args, **kwargs)
            state: State = "failed" if seen.faults else "not compared" if seen.not_compared else "passed"
            saw = "; ".join(seen.faults) or seen.otherwise
            return Check(number=number, name=name, state=state, saw=saw, why=why, advice=advice)

        needs = tuple(p for p, value in parameters.items() if value.default is inspect.Parameter.empty)
        CHECKS[number] = Registered(number, name, needs, tuple(set(parameters) - set(needs)), make)
        return make

    return register


def run_checks(evidence: Evidence, numbers: Sequence[int] | None = None) -> list[Check]:
    """Run all checks, or those of `numbers`, for which the evidence suffices, in the order of their numbers."""
    at_hand = {field.name: value for field in fields(evidence) if (value := getattr(evidence, field.name)) is not None}
    checks = []
    for number in sorted(CHECKS) if numbers is None else numbers:
        check = CHECKS[number]
        if set(check.needs) <= at_hand.keys():
            arguments = {name: at_hand[name] for name in (*check.needs, *check.may_use) if name in at_hand}
            checks.append(check.make(**arguments))
    return checks
