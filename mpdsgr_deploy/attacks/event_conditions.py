"""Attacks on event frames as conditions of evaluations, bounded by a number of events instead of eps.

The worst case within eps leaves them out, because a single event changes a pixel by a whole count. Each has its own
row in reports and its own limits of the gate. Two of them are comparable if their budgets, part of their settings, are
equal.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import numpy as np

from mpdsgr_deploy.attacks.condition import Attacked, Batch, Condition, Floats, Generators, Kind, Network, register
from mpdsgr_deploy.attacks.counting import CountedGradients, GradientCounts
from mpdsgr_deploy.attacks.event_search import Counts, Edit, EventSearch, can_gain, can_lose, counts_of, search_events
from mpdsgr_deploy.data.events import COUNT_CAP
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.protocols import Differentiable, Predictor
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.surrogates import PDSG

Target = tuple[Predictor, Sequence[Differentiable]]  # a network, and its gradients through each surrogate
POLARITIES = 2  # channels of a frame
IMPOSSIBLE = -np.inf  # predicted gain of an impossible edit
GRADIENT_SEARCH = EventSearch(rounds=20, share=0.05)  # trusts the gradient; made through each surrogate
QUERY_SEARCHES = (
    EventSearch(rounds=8, share=0.2, candidates=10),
    EventSearch(rounds=8, share=None, candidates=10),
)  # these test each edit on the network; the last is SDA


@dataclass(frozen=True, kw_only=True)
class EventAttack(Condition):
    """Make at most `budget` edits of events in frames with counts 0..levels; subclasses define the edits.

    Searches run one after the other on recordings that are still classified correctly: first GRADIENT_SEARCH, with
    `steps` rounds, through `surrogate` and each of `others`, then each of `asking` through `surrogate`.
    """

    kind: ClassVar[Kind] = "gradient"
    edits: ClassVar[str]  # what is done to events, in words

    budget: int
    levels: int = COUNT_CAP
    loss: str = "weighted"
    steps: int = GRADIENT_SEARCH.rounds
    others: tuple[str, ...] = ("triangle:1", "superspike:5")
    asking: tuple[EventSearch, ...] = QUERY_SEARCHES

    @classmethod
    def recipe_values(cls, attack: Attack) -> dict[str, Any]:
        return {"eps": None, "budget": attack.events, "surrogate": PDSG}

    @property
    def settings(self) -> str:
        names = ", ".join([str(self.surrogate), *self.others])
        query_text = " and ".join(
            f"{search.rounds} rounds of {search.candidates} candidates more each, {search.share or 'all'}"
            for search in self.asking
        )
        bounds = f"at most {self.budget} events {self.edits}, frames of 0 to {self.levels} events"
        return f"{bounds}; {self.steps} rounds through each of {names}; {query_text}"

    @property
    def cost(self) -> int:
        gradient_rounds = self.steps * (1 + len(self.others))
        queries = sum(s.candidates * s.rounds * (s.rounds + 1) // 2 for s in self.asking)
        return (gradient_rounds + sum(s.rounds for s in self.asking)) * self.draws + queries // 3

    @contextmanager
    def target(self, network: Network) -> Iterator[Target]:
        with ExitStack() as stack:
            names = [str(self.surrogate), *self.others]
            ways = [network.attacker(name, loss=self.loss, draws=self.draws) for name in names]
            yield network, [stack.enter_context(way) for way in ways]

    def attack(self, target: Target, batch: Batch, generators: Generators) -> Attacked:
        network, counts = _CountedQueries(target[0]), GradientCounts()
        ways = [CountedGradients(way, counts) for way in target[1]]
        gradient_search = GRADIENT_SEARCH._replace(rounds=self.steps)
        images, active = batch.x.copy(), np.arange(len(batch.y))
        searches = [*((way, gradient_search) for way in ways), *((ways[0], search) for search in self.asking)]
        for way, search in searches:
            x, y = batch.x[active], batch.y[active]
            images[active] = search_events(
                network, way, x, y, self.propose, budget=self.budget, levels=self.levels, search=search
            )
            active = active[network(images[active]).argmax(axis=1) == y]
            if not len(active):
                break
        gradients, zero, not_finite = (count * self.draws for count in astuple(counts))
        return Attacked(images, gradients + network.queries, zero, not_finite)

    @abstractmethod
    def propose(self, counts: Counts, clean: Counts, slope: Floats, most_edits: int) -> list[Edit]:
        """Return at most `most_edits` possible edits, the most promising first; see `event_search.Propose`."""

    @abstractmethod
    def spent(self, change: Counts) -> Counts:
        """Return the number of edits [B] that explain changes of counts [B, C, H, W]; above the budget if none do."""

    def faults(self, clean: Floats, attacked: Floats) -> list[str]:
        try:
            change = counts_of(attacked, self.levels) - counts_of(clean, self.levels)
        except InputError:
            return [f"{self.name} leaves pixels that are no counts of 0 to {self.levels} events"]
        spent = int(self.spent(change).max(initial=0))
        return [f"{self.name} has an image with more than {self.budget} events {self.edits}"] * (spent > self.budget)


@register
@dataclass(frozen=True, kw_only=True)
class EventFlips(EventAttack):
    """Add and remove events, as SDA (Lun et al., CVPR 2025) does; for binary frames (levels = 1) this flips bits."""

    method: ClassVar[str] = "event-flips"
    edits: ClassVar[str] = "added or removed"

    def propose(self, counts: Counts, clean: Counts, slope: Floats, most_edits: int) -> list[Edit]:
        gain = np.where(can_gain(counts, clean, self.levels), slope, IMPOSSIBLE).ravel()
        loss = np.where(can_lose(counts, clean), -slope, IMPOSSIBLE).ravel()
        best = _best(np.concatenate([gain, loss]), most_edits).tolist()
        return [Edit(None, i) if i < gain.size else Edit(i - gain.size, None) for i in best]

    def spent(self, change: Counts) -> Counts:
        return np.asarray(np.abs(change).sum((1, 2, 3)))


@register
@dataclass(frozen=True, kw_only=True)
class EventRetiming(EventAttack):
    """Move events to other frames; every pixel and polarity keeps its number of events, so firing rates do not change.

    The threat model is that of Yu et al., arXiv 2602.03284, with the number of moved events as the budget; the search
    is `search_events` instead of theirs. shift: the largest number of frames by which an event moves; None: no limit.
    """

    method: ClassVar[str] = "event-retiming"

    shift: int | None = None

    @property
    def edits(self) -> str:  # type: ignore[override]
        within = "" if self.shift is None else f" by at most {self.shift}"
        return f"moved to another frame{within}"

    def propose(self, counts: Counts, clean: Counts, slope: Floats, most_edits: int) -> list[Edit]:
        frames, width = _frames(counts), counts[0].size * POLARITIES  # [T, places]
        before, slopes = _frames(clean), _frames(slope)
        gain_of_removal = np.where(can_lose(frames, before), -slopes, IMPOSSIBLE)
        gain_of_addition = np.where(can_gain(frames, before, self.levels), slopes, IMPOSSIBLE)
        steps = np.arange(len(frames))
        distance = np.abs(steps[:, None] - steps[None, :])
        allowed = (distance > 0) & (distance <= (self.shift or len(frames)))
        predicted_gain = np.where(
            allowed[:, :, None], gain_of_removal[:, None] + gain_of_addition[None], IMPOSSIBLE
        )  # [from, to, place]
        starts, ends, places = np.unravel_index(_best(predicted_gain.ravel(), most_edits), predicted_gain.shape)
        edits = zip((starts * width + places).tolist(), (ends * width + places).tolist(), strict=True)
        return [Edit(out, into) for out, into in edits]

    def spent(self, change: Counts) -> Counts:
        frames = change.reshape(len(change), -1, POLARITIES * change[0, 0].size)
        conserved = (frames.sum(axis=1) == 0).all(axis=1)
        return np.where(conserved, np.abs(change).sum((1, 2, 3)) // 2, self.budget + 1)


class _CountedQueries:
    """A Predictor that counts the images it classifies."""

    def __init__(self, network: Predictor) -> None:
        self._network, self.queries = network, 0

    def __call__(self, x: Floats) -> Floats:
        self.queries += len(x)
        return self._network(x)


def _best(predicted_gain: Floats, most_edits: int) -> Counts:
    """Return the indices of the `most_edits` largest values, largest first, without those of impossible edits."""
    count = min(most_edits, predicted_gain.size)
    places = np.argpartition(-predicted_gain, count - 1)[:count]
    ordered = places[np.lexsort((places, -predicted_gain[places]))]
    return ordered[predicted_gain[ordered] > IMPOSSIBLE]


def _frames(values: Any) -> Any:
    """Reshape [2 T, H, W] to [T, 2 H W]. Raises InputError for an odd number of channels."""
    if len(values) % POLARITIES:
        raise InputError(f"events move between frames of two channels each; this network has {len(values)} channels")
    return values.reshape(len(values) // POLARITIES, -1)
