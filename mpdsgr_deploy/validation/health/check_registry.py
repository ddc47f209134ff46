"""The registry of health checks: each has a number, a name, why it matters, and what to do if it fails.

A check is a function whose parameters name parts of the `Evidence`; it runs if all parts without a default are
available. A check that fails makes the verdict invalid.
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
    """What a check returns: its `faults` as phrases, none if it passed, and `otherwise` what to report without faults.

    not_compared: whether there was nothing to compare with, so that the check neither passed nor failed.
    """

    faults: Sequence[str]
    otherwise: str
    not_compared: bool = False


class Check(BaseModel):
    """The result of one health check. saw: what it found; why: why it matters; advice: what to do if it failed."""

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
    """The effect of twice the steps: of n images, `standing` survived all attacks, and `broken` of these broke now.

    attacks: the original number of steps by attack. worst: the accuracy in the worst case over all images of the
    evaluation, in [0, 1]. floor: the least `worst` that the gate allows, None without such a rule.
    """

    broken: int
    standing: int
    n: int
    attacks: Mapping[str, int]
    worst: float
    floor: float | None = None


class Reach(NamedTuple):
    """Artefact and reference under the attacks that both met.

    reference: whether there is one for these images. flips: of the worst case, None if both met no common attack.
    missing: attacks that the reference should have met but has not. alone: attacks that only the artefact met. allowed:
    the change of accuracy that the gate allows in the worst case, in [0, 1]. contradictions: number of images that the
    reference counts as right in the worst case although one of its attacks broke them. each: flips by attack.
    """

    reference: bool
    flips: VerdictFlips | None = None
    missing: Sequence[str] = ()
    alone: Sequence[str] = ()
    allowed: float = 0.0
    contradictions: int = 0
    each: Mapping[str, VerdictFlips] = MappingProxyType({})


class Slopes(NamedTuple):
    """The rise of the loss along the gradient and in random directions, computed from the network's logits.

    steeper: the number of images, of n, whose loss rises further along the gradient. rises: the mean rise along the
    gradient and in random directions, by step size.
    """

    steeper: int
    n: int
    rises: Mapping[float, tuple[float, float]]


class Search(NamedTuple):
    """The result of random search on the images that no attack with a gradient broke.

    broken: number of images that it broke, of the `standing` images that it was tried on, which are a part of n images.
    queries: number of queries per image.
    """

    broken: int
    standing: int
    n: int
    queries: int


class Rebuilt(NamedTuple):
    """How the bundle's files differ from a new export of its weights, or `unknown`: why there is no new export."""

    faults: Sequence[str] = ()
    unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence that checks examine. A part that is None is not available, and checks that need it do not run.

    rule: a phrase that names the n images. against: what the gate compares with, "" for nothing. budget_faults: how
    attacked images break the rules of their attack. verdicts [n] by condition, without an early stop. black_box,
    white_box: names of the conditions within eps without and with the network's gradient. growth: verdicts [m] by eps.
    surrogates: those of all attacks with gradients. trained: the training surrogate. gradients: how many were computed
    through it, how many of these were zero, and how many not finite. artefact, fresh: the network here and in a new
    process. x: the clean images [n, C, H, W], with logits [n, K] and true classes [n]. batch_sizes: the recipe's, and
    the largest of every engine. rounded_outputs: whether the file rounds its logits to 8 bits. image_faults: how the
    images differ from the promised ones. labels: the names of the K classes. foreign: parts of the file that are not
    standard. not_finite: places of the images whose logits are not finite, by condition.
    """

    rule: str
    n: int
    against: str | None = None
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
    """A check in the registry. needs, may_use: the parts of the evidence that it requires, and that are optional."""

    needs: tuple[str, ...]
    may_use: tuple[str, ...]
    make: Callable[..., Check]


CHECKS: dict[int, Registered] = {}


def health_check(number: int, name: str, *, why: str, advice: str) -> Callable[[Callable[P, Seen]], Callable[P, Check]]:
    """Decorator: register a function as the check of a free number. Its parameters name parts of the evidence."""

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
        CHECKS[number] = Registered(needs, tuple(set(parameters) - set(needs)), make)
        return make

    return register


def run_checks(evidence: Evidence) -> list[Check]:
    """Run the checks for which the evidence suffices, in the order of their numbers."""
    available = {
        field.name: value for field in fields(evidence) if (value := getattr(evidence, field.name)) is not None
    }
    checks = []
    for _, check in sorted(CHECKS.items()):
        if set(check.needs) <= available.keys():
            arguments = {name: available[name] for name in (*check.needs, *check.may_use) if name in available}
            checks.append(check.make(**arguments))
    return checks
