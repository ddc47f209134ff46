"""The conditions of one evaluation and the networks they attack.

The same conditions serve the torch network when it is exported and the artefact when it is validated. What is drawn for
an image depends on the seed, the condition and the image's place in the test set, on nothing else: not on the batch it
is in, on the images before it, or on which attacks ran.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mpdsgr_deploy.attacks.condition import Attacked, Batch, Condition, Network, Source
from mpdsgr_deploy.attacks.tiers import TierEntry, resolved
from mpdsgr_deploy.recipe import Attack


@dataclass(frozen=True)
class Suite:
    """Conditions, weak ones first, on a network. transfer: other networks, by the name of their condition."""

    source: Source
    conditions: tuple[Condition, ...]
    transfer: Mapping[str, Source] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Source,
        entries: Sequence[TierEntry],
        attack: Attack,
        *,
        seed: int,
        transfer: Mapping[str, Source] | None = None,
    ) -> "Suite":
        """The suite that entries stand for on this network. Raises InputError as `resolved` does."""
        others = transfer or {}
        surrogates = {name: other.trained for name, other in others.items()}
        stochastic = source.network.stochastic
        made = resolved(entries, attack, source.trained, seed=seed, stochastic=stochastic, transfer=surrogates)
        return cls(source, tuple(made), others)

    @property
    def network(self) -> Network:
        """The network that is attacked, and that classifies attacked images."""
        return self.source.network

    @contextmanager
    def open(self, condition: Condition) -> Iterator[Callable[[Batch], Attacked]]:
        """Open an attack by a condition, which need not be one of the suite's.

        What attacks a stochastic network is opened anew for every batch, which then meets the same noise whatever came
        before it: a batch evaluated after a kill has the result it had before.
        """
        network = self.transfer[condition.sender].network if condition.kind == "transfer" else self.network

        def once(batch: Batch) -> Attacked:
            with condition.target(network) as fresh:
                return condition.attack(fresh, batch, condition.generators(batch))

        if network.stochastic:
            yield once
            return
        with condition.target(network) as target:
            yield lambda batch: condition.attack(target, batch, condition.generators(batch))
