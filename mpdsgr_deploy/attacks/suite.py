"""The conditions of one evaluation and the networks they attack.

The same conditions attack the torch network during export and the artefact during validation. The random numbers for an
image depend only on the seed, the condition and the image's place in the test set. They do not depend on its batch, on
other images or on other conditions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mpdsgr_deploy.attacks.condition import Attacked, Batch, Condition, Network, Source
from mpdsgr_deploy.attacks.tiers import TierEntry, resolved
from mpdsgr_deploy.recipe import Attack


@dataclass(frozen=True)
class Suite:
    """Conditions, weak attacks first, on a network.

    transfer: other networks whose attacked images are tested on this one, by the name of their condition.
    """

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
        """Return the suite of the conditions that `entries` define for the network of `source`.

        Raises InputError for an unknown method or surrogate.
        """
        others = transfer or {}
        surrogates = {name: other.trained for name, other in others.items()}
        stochastic = source.network.stochastic
        conditions = resolved(entries, attack, source.trained, seed=seed, stochastic=stochastic, transfer=surrogates)
        return cls(source, tuple(conditions), others)

    @property
    def network(self) -> Network:
        """The network that is attacked and that classifies the attacked images."""
        return self.source.network

    @contextmanager
    def open(self, condition: Condition) -> Iterator[Callable[[Batch], Attacked]]:
        """Return a context manager that yields the attack of a condition, which need not be one of the suite's.

        For a stochastic network the attack is opened anew for every batch, so that its noise does not depend on the
        batches before. A batch that is evaluated after an interruption then has the same result as without one.
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
