"""The conditions of evaluations, as data: the three tiers of the gate, and the attacks that recipes ask for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mpdsgr_deploy.attacks import blind as _blind  # noqa: F401
from mpdsgr_deploy.attacks import conditions as _registered  # noqa: F401  (registers the conditions named here)
from mpdsgr_deploy.attacks import event_conditions as _events  # noqa: F401
from mpdsgr_deploy.attacks import hart as _averaged  # noqa: F401
from mpdsgr_deploy.attacks import mpd_apgd_condition as _too  # noqa: F401
from mpdsgr_deploy.attacks import targeted_conditions as _targeted  # noqa: F401
from mpdsgr_deploy.attacks.condition import (
    APGD_CE,
    APGD_DLR,
    APGD_T,
    BIM,
    CONDITIONS,
    CW,
    FAB_T,
    FGSM,
    GAUSSIAN,
    MPD_APGD,
    PGD,
    SA_PGD,
    SQUARE,
    STRONG,
    TRANSFER,
    UNIFORM,
    WORST,
    Condition,
)
from mpdsgr_deploy.attacks.mpd_apgd import QUICK
from mpdsgr_deploy.recipe import Attack
from mpdsgr_deploy.surrogates import ADAPTIVE, scaled

TRAINED = "trained"  # the surrogate the network under attack was trained with
EACH = "each"  # one condition for every surrogate that the recipe names


@dataclass(frozen=True)
class TierEntry:
    """One line of a tier: a registered condition, its name and what differs from the recipe.

    name: `{surrogate}` in it stands for the surrogate. surrogate: by name, or TRAINED, or EACH; window: how many times
    as wide as that. once: left out where an entry before it attacks through the same surrogate by the same method.
    values: fields of the condition.
    """

    method: str
    name: str
    surrogate: str = TRAINED
    window: float = 1.0
    once: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    def surrogates(self, attack: Attack, trained: str) -> Sequence[str]:
        """The surrogates that this entry attacks through, by name."""
        if self.surrogate == EACH:
            return attack.surrogates
        name = trained if self.surrogate == TRAINED else self.surrogate
        return (name if self.window == 1 else scaled(name, self.window),)


def entry(
    method: str, name: str, surrogate: str = TRAINED, *, window: float = 1.0, once: bool = False, **values: Any
) -> TierEntry:
    """An Entry, whose condition has these `values`."""
    return TierEntry(method, name, surrogate, window, once, values)


@dataclass(frozen=True)
class Tier:
    """How many images are attacked, and how hard.

    suite: the version of its attacks. Raise it when one of them gets stronger, since `worst` of an earlier version
    overstates what survives: records of tables and studies carry it, and those of an earlier version are measured
    again. images: the first so many test images, None: all. probe: images on which growing eps and convergence are
    checked. max_drop: largest loss of accuracy that the gate allows where it does not say, in [0, 1]; with fewer images
    than can decide that, the smallest that they can.
    """

    suite: int
    images: int | None
    probe: int
    max_drop: float
    entries: tuple[TierEntry, ...]


THROUGH = "strong {surrogate}"
BASIC = (
    entry("gaussian", GAUSSIAN),
    entry("uniform", UNIFORM, rank=0),
    entry("fgsm", FGSM, rank=1),
    entry("pgd", BIM, random_start=False),
    entry("pgd", PGD, rank=2),
    entry("transfer", TRANSFER),
)
# From a network that the caller names, not from the float32 file of the same bundle.
STRONG_TRANSFER = entry("transfer-strong", "transfer-strong")
# The surrogates without which an evaluation is not believed: a quarter and 2.5 times as wide, and rectangular.
SWEEP = (
    entry("strong-pgd", THROUGH, window=0.25, once=True),
    entry("strong-pgd", THROUGH, window=2.5, once=True),
    entry("strong-pgd", THROUGH, "rectangular:1", once=True),
)
# Sizes follow benchmarks/MPD_APGD.md: MPD-APGD leaves what no other attack here breaks, APGD through the surrogate of
# training breaks nothing beside it, and the longer it runs, the less the rest adds.
TIERS = {
    "commit": Tier(
        suite=3,
        images=350,
        probe=50,
        max_drop=0.03,
        entries=(
            *BASIC,
            entry("strong-pgd", STRONG, rank=3),
            *SWEEP,
            entry("sa-pgd", SA_PGD),
            entry("mpd-apgd", MPD_APGD, schedule=QUICK),
            STRONG_TRANSFER,
            entry("square", SQUARE, queries=100),
        ),
    ),
    "release": Tier(
        suite=4,
        images=1000,
        probe=100,
        max_drop=0.01,
        entries=(
            *BASIC,
            entry("strong-pgd", STRONG, rank=3),
            *SWEEP,
            entry("sa-pgd", SA_PGD),
            entry("mpd-apgd", MPD_APGD),
            STRONG_TRANSFER,
            entry("square", SQUARE, queries=500),
        ),
    ),
    "paper": Tier(
        suite=4,
        images=None,
        probe=500,
        max_drop=0.01,
        entries=(
            *BASIC,
            entry("strong-pgd", STRONG, rank=3, restarts=5),
            *SWEEP,
            entry("strong-pgd", THROUGH, EACH, once=True),
            entry("sa-pgd", SA_PGD, steps=200),
            entry("apgd", APGD_CE, loss="ce", steps=100),
            entry("apgd", APGD_DLR, loss="dlr", steps=100),
            entry("apgd-t", APGD_T),
            entry("fab-t", FAB_T),
            entry("mpd-apgd", MPD_APGD, steps=200),
            STRONG_TRANSFER,
            entry("square", SQUARE, queries=5000),
        ),
    ),
}


RECIPES_SUITE = 4  # the version of the attacks that recipes ask for


def suite_of(tier: str | None) -> int:
    """Return the version of a tier's attacks; None: of those that recipes ask for."""
    return RECIPES_SUITE if tier is None else TIERS[tier].suite


def smaller_tiers(tier: str) -> list[str]:
    """The tiers below this one, smallest first."""
    names = list(TIERS)
    return names[: names.index(tier)]


# The names of conditions in the order in which accuracy must not rise, weakest attack first.
BY_STRENGTH = (
    *(
        line.name
        for line in sorted(TIERS["commit"].entries, key=lambda e: e.values.get("rank", 0))
        if "rank" in line.values
    ),
    WORST,
)


def recipe_entries(attack: Attack) -> tuple[TierEntry, ...]:
    """Return the entries that a recipe asks for, for tables of trained networks."""
    l2 = () if attack.l2 is None else (entry("cw-l2", CW),)
    return (*BASIC, entry("strong-pgd", STRONG, rank=3), entry("strong-pgd", THROUGH, EACH), *l2)


def resolved(
    entries: Sequence[TierEntry],
    attack: Attack,
    trained: str,
    *,
    seed: int = 0,
    stochastic: bool = False,
    transfer: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Condition]:
    """The conditions that entries stand for, weak ones first, on a network with the surrogate `trained`.

    attack: the recipe's settings. transfer: for each other network whose images are tried, the name of its condition
    and the surrogate it was trained with. Raises InputError for an unknown method or surrogate.
    """
    noisy = {"draws": attack.draws, "keep": "worst"} if stochastic else {}
    attacked: set[tuple[str, str]] = set()
    for line in [*entries, *(entry(method, method) for method in attack.also)]:
        kind = CONDITIONS.choose(line.method)
        fields = {**kind.recipe_values(attack), **line.values, "seed": seed, **noisy}
        if kind.kind == "transfer":
            for sender in transfer if line.name == TRANSFER else transfer.keys() & {TRANSFER}:
                name = sender if line.name == TRANSFER else line.name
                yield kind(name=name, sender=sender, **{"surrogate": transfer[sender], **fields})
        elif kind.kind != "gradient":
            yield kind(name=line.name, **fields)
        else:
            for surrogate in [fields.pop("surrogate")] if "surrogate" in fields else line.surrogates(attack, trained):
                if not (line.once and (line.method, surrogate) in attacked):
                    yield kind(name=line.name.format(surrogate=surrogate), surrogate=surrogate, **fields)
                attacked.add((line.method, surrogate))


def required_surrogates(trained: str) -> tuple[str, ...]:
    """The surrogates that check 6 asks for, beside the trained one."""
    sweep = [name for line in SWEEP for name in line.surrogates(Attack(), trained)]
    return (ADAPTIVE, *(name for name in dict.fromkeys(sweep) if name != trained))
