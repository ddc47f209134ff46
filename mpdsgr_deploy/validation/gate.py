"""The gate: the accuracy that an artefact must keep, decided by paired tests on enough images.

A drop fails if the artefact loses more than the limit and the loss is significant: of the images whose verdict differs,
more than half are newly wrong by an exact one-sided McNemar test. The accuracy without attack and that under all
attacks are tested at p < 0.003, where most damage shows, each single attack at p < 0.0005: with a dozen of them a
healthy artefact is refused less than once in a hundred times (computed exactly for 100 to 1,000 images and flips up to
20 %). Eleven images that only the artefact gets wrong are the fewest that can show a drop under a single attack, so a
limit of 1 % takes 1,000 images; `proportions.smallest_drop` says which drops a run can see.

Many faults cost a little under every attack. If a drop is beyond its limit but not significant by itself, all
conditions are therefore tested together: per image, the conditions that the artefact lost minus those that it gained,
and over images the exact paired permutation test (signs flipped at random), at p < 0.001. Conditions of one image
depend on one another, which this test allows for, because it flips an image as a whole. benchmarks/gate_power.py
measures its power.

Square is left out unless the gate names it in `drops`: its random search differs on every network, which by chance
changes about a dozen of 100 verdicts. Images that it breaks count in the worst case. A floor fails if the artefact's
accuracy is below it; a floor is decidable if the 95 % Wilson interval of n right images begins above it.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, SQUARE, WORST
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.schema import parse, read_toml
from mpdsgr_deploy.signing.trust import beside
from mpdsgr_deploy.validation.proportions import Z95, binomial_tail, sign_flip_tail
from mpdsgr_deploy.validation.rows import Reason, Row

SIGNIFICANT = 0.0005  # p-value below which a drop under one attack is significant
SIGNIFICANT_OVERALL = 0.003  # the same for the accuracies in OVERALL
SIGNIFICANT_TOGETHER = 0.001  # the same for all conditions together
OVERALL = (CLEAN, WORST)
CHANCY = (SQUARE,)

REQUIRE_SIGNATURE = "require_signature"  # a key that only gate files may have

Bools = NDArray[np.bool_]


def load_gate(path: Path) -> Gate:
    """The rules of a gate file. Raises InputError for a missing file or an unknown key."""
    values = read_toml(path)
    values.pop(REQUIRE_SIGNATURE, None)
    return parse(Gate, values, str(path))


def signature_of_gate(path: Path) -> str | None:
    """Return the key that a gate file requires as signer, if any; a relative path starts beside the file.

    A gate in a bundle's own recipe cannot require one, because the bundle would vouch for itself. Raises InputError as
    `load_gate` does.
    """
    text = read_toml(path).get(REQUIRE_SIGNATURE)
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(
            f"{path}: {REQUIRE_SIGNATURE} must be a text, the path of a file with a public key or certificates"
        )
    return beside(path, text)


def usual_limit(gate: Gate) -> float:
    """Return the drop allowed in conditions without a rule of their own: the gate's, else the tier's."""
    return TIERS[gate.tier].max_drop if gate.max_drop is None else gate.max_drop


def limit(gate: Gate, name: str) -> float:
    """Return the drop of accuracy allowed in a condition; 1 allows any."""
    return gate.drops.get(name, 1.0 if name in CHANCY else usual_limit(gate))


def significant(name: str) -> float:
    """Return the p-value below which a drop in a condition is significant."""
    return SIGNIFICANT_OVERALL if name in OVERALL else SIGNIFICANT


def fewest_flips(p: float) -> int:
    """Return the smallest number of flips, all one way, that is significant at this p-value."""
    return math.floor(-math.log2(p)) + 1


def least_decidable(n: int) -> float:
    """Return the smallest limit on a drop, in [0, 1], that n images can decide in every condition."""
    return (fewest_flips(SIGNIFICANT) - 1) / n if n else 1.0


def fewest_images(gate: Gate, names: Iterable[str]) -> int:
    """Return the smallest n with which every rule of the gate can be decided, for the conditions `names`."""
    limits = {(limit(gate, name), fewest_flips(significant(name))) for name in names}
    drops = [flips if not share else math.ceil((flips - 1) / share - 1e-9) for share, flips in limits if share < 1]
    floors = [math.ceil(Z95**2 * floor / (1 - floor)) for floor in gate.floors.values() if floor < 1]
    return max([1, *drops, *floors])


def check_gate(gate: Gate, names: Sequence[str], n: int, referenced: Collection[str]) -> None:
    """Raise InputError for a gate that decides nothing, or whose rules cannot be decided.

    A rule cannot be decided if its condition is not evaluated, if it bounds a drop in a condition that the reference
    never met, or if n images are too few.

    referenced: those of the conditions `names` that the reference has verdicts of.
    """
    for name in (*gate.floors, *gate.drops):
        if name not in names:
            raise InputError(f"the gate has a rule for {name!r}, which is not evaluated here: {', '.join(names)}")
    if not referenced and not gate.floors:
        raise InputError(
            "the gate has nothing to decide: the bundle has no reference for these images, and the gate has no "
            "floors; export again on a machine with the data set, or add floors to the gate"
        )
    for name in gate.drops:
        if name not in referenced:
            raise InputError(
                f"the gate limits the drop under {name!r}, with which the bundle's reference was not attacked; "
                f"export again with --tier {gate.tier} on a machine with the data set"
            )
    needed = fewest_images(gate, referenced)
    if n < needed:
        raise InputError(
            f"{n} images cannot decide this gate, which needs {needed} images; use more (--limit, or --tier when "
            "exporting), or allow a larger drop in the gate"
        )


def regressed(gate: Gate, name: str, n: int, worse: int, better: int) -> bool:
    """Whether the loss in a condition exceeds what is allowed there, and is significant."""
    excess = worse - better > limit(gate, name) * n + 1e-9
    return excess and binomial_tail(worse, worse + better) < significant(name)


def failures(gate: Gate, rows: list[Row]) -> list[Reason]:
    """Return one reason for each rule that the artefact breaks. Rows that ended early are judged by `lost`."""
    reasons = []
    n = max((row.n for row in rows), default=0)
    whole = [row for row in rows if row.n == n]
    for row in whole:
        if row.flips is not None:
            worse, better, allowed = row.flips.newly_wrong, row.flips.newly_right, limit(gate, row.name)
            if regressed(gate, row.name, row.n, worse, better):
                text = f"of {row.n} images {worse} are newly wrong and {better} newly right"
                drop = f"a drop of {(worse - better) / row.n:.2%}, where {allowed:.2%} is allowed"
                reasons.append(Reason(condition=row.name, text=f"{text}, {drop}"))
        floor = gate.floors.get(row.name)
        if floor is not None and row.artefact.accuracy < floor:
            text = f"accuracy {row.artefact.accuracy:.2%} is below the floor {floor:.2%}"
            reasons.append(Reason(condition=row.name, text=text))
    return reasons or together(gate, whole)


def together(gate: Gate, rows: Sequence[Row]) -> list[Reason]:
    """Return the largest drop beyond its limit, if the losses of the bounded conditions are significant together."""
    bounded = [row for row in rows if row.reference is not None and limit(gate, row.name) < 1]
    beyond = {row.name: drop for row in bounded if (drop := _drop(row)) > limit(gate, row.name) + 1e-9}
    single = [row for row in bounded if row.name != WORST]  # leave out `worst`, which is computed from the others
    if not (beyond and single):
        return []
    p = sign_flip_tail(np.sum([_losses(row) for row in single], axis=0))
    if p >= SIGNIFICANT_TOGETHER:
        return []
    name = max(beyond, key=lambda name: beyond[name] - limit(gate, name))
    text = f"a drop of {beyond[name]:.2%}, where {limit(gate, name):.2%} is allowed"
    return [
        Reason(
            condition=name,
            text=f"{text}; statistically significant over {len(single)} conditions together, p = {p:.1g}",
        )
    ]


def _drop(row: Row) -> float:
    return 0.0 if row.flips is None else (row.flips.newly_wrong - row.flips.newly_right) / row.n


def _losses(row: Row) -> NDArray[np.int64]:
    """Return [n]: 1 where the artefact alone is wrong, -1 where the reference alone is, else 0."""
    assert row.reference is not None
    return row.reference.verdicts(row.n).astype(np.int64) - row.artefact.verdicts(row.n)


def lost(gate: Gate, name: str, correct: Bools, reference: Bools | None, n: int) -> str | None:
    """Return why the gate will fail for any outcome on the remaining images; None while it can still pass.

    correct: verdicts [m] on the first m of n images; reference: all of its verdicts [n].
    """
    attacked = len(correct)
    floor = gate.floors.get(name)
    if floor is not None and correct.sum() + n - attacked < math.ceil(floor * n - 1e-9):
        return f"after {attacked} of {n} images the floor {floor:.2%} cannot be reached any more"
    if reference is not None:
        worse, better = int((reference[:attacked] & ~correct).sum()), int((~reference[:attacked] & correct).sum())
        # at best, all remaining images that the reference gets wrong are classified correctly
        best = better + int((~reference[attacked:]).sum())
        if regressed(gate, name, n, worse, best):
            return f"after {attacked} of {n} images the drop cannot return within the limit any more"
    return None
