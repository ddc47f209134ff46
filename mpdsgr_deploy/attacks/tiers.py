"""The conditions of evaluations, as data: the three tiers of the gate, and the attacks that recipes select."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# These modules register the conditions that tiers and recipes name.
from mpdsgr_deploy.attacks import blind, conditions, event_conditions, hart, mpd_apgd, targeted_conditions  # noqa: F401
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
    """One line of a tier: a registered condition, its name, and the fields that differ from the recipe.

    name: `{surrogate}` in it is replaced by the surrogate's name. surrogate: a name, or TRAINED, or EACH. window:
    factor on the surrogate's width. once: leave the condition out if an earlier entry attacks by the same method
    through the same surrogate. values: fields of the condition.
    """

    method: str
    name: str
    surrogate: str = TRAINED
    window: float = 1.0
    once: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    def surrogates(self, attack: Attack, trained: str) -> Sequence[str]:
        """Return the names of the surrogates through which this entry attacks."""
        if self.surrogate == EACH:
            return attack.surrogates
        name = trained if self.surrogate == TRAINED else self.surrogate
        return (name if self.window == 1 else scaled(name, self.window),)


def entry(
    method: str, name: str, surrogate: str = TRAINED, *, window: float = 1.0, once: bool = False, **values: Any
) -> TierEntry:
    """Return a TierEntry for conditions with these `values`."""
    return TierEntry(method, name, surrogate, window, once, values)


@dataclass(frozen=True)
class Tier:
    """How many images are attacked, and how hard.

    suite: the version of the tier's attacks. Raise it when an attack gets stronger, because `worst` accuracies of an
    earlier version are then too high: records of tables and studies store the version, and records of an earlier one
    are measured again. images: number of test images, from the first on; None: all. probe: number of images for the
    health checks of growing eps and of convergence. max_drop: largest loss of accuracy in [0, 1] that a gate allows
    unless it sets its own; with too few images to detect this loss, the smallest loss that they can detect.
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
# Images made on a network that the caller names, whereas `transfer` uses the float32 file of the same bundle.
STRONG_TRANSFER = entry("transfer-strong", "transfer-strong")
# The surrogates that a valid evaluation must include: a quarter and 2.5 times the trained width, and rectangular.
SWEEP = (
    entry("strong-pgd", THROUGH, window=0.25, once=True),
    entry("strong-pgd", THROUGH, window=2.5, once=True),
    entry("strong-pgd", THROUGH, "rectangular:1", once=True),
)
# Numbers of steps follow benchmarks/MPD_APGD.md: the images that MPD-APGD does not break, no other attack here breaks
# either, APGD through the surrogate of training included. The longer MPD-APGD runs, the less the other attacks add.
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


RECIPES_SUITE = 4  # the version of the attacks that recipes select


def suite_of(tier: str | None) -> int:
    """Return the version of a tier's attacks; for None, of the attacks that recipes select."""
    return RECIPES_SUITE if tier is None else TIERS[tier].suite


def smaller_tiers(tier: str) -> list[str]:
    """Return the names of the tiers below this one, smallest first."""
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
    """Return the entries that a recipe selects, for tables of trained networks."""
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
    """Yield the conditions that entries define for a network trained with the surrogate `trained`, weak attacks first.

    attack: the recipe's settings. stochastic: whether the network draws noise. transfer: for each other network whose
    images are tested, the name of its condition and the surrogate it was trained with. Raises InputError for an unknown
    method or surrogate.
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
    """Return the surrogates that health check 6 requires in addition to the trained one."""
    sweep = [name for line in SWEEP for name in line.surrogates(Attack(), trained)]
    return (ADAPTIVE, *(name for name in dict.fromkeys(sweep) if name != trained))
