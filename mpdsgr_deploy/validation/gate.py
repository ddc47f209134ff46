"""The gate: decide whether an artefact keeps enough accuracy, by paired tests on enough images.

A drop in accuracy fails the gate if it exceeds its limit and is significant, by the exact one-sided McNemar test of the
images that are newly wrong against those that are newly right. Clean accuracy and accuracy under all attacks, where
most damage shows, are tested at p < 0.003, and each single attack at p < 0.0005. With a dozen attacks, this refuses a
healthy artefact less than once in a hundred times (computed exactly for 100 to 1,000 images and flips up to 20 %). A
drop under a single attack is significant with 11 newly wrong images at least, so a limit of 1 % needs 1,000 images.
`proportions.smallest_drop` computes which drops a run can detect.

Many faults cost a little accuracy under every attack. If a drop exceeds its limit without being significant, all
conditions are tested together at p < 0.001, by an exact paired permutation test over images (with randomly flipped
signs) of the number of conditions lost minus those gained. The test flips all conditions of an image together, because
they depend on one another. benchmarks/gate_power.py measures its power.

Square is left out unless the gate names it in `drops`: its random search takes another course on every network, which
changes about a dozen of 100 verdicts by chance. Images that it breaks count in the worst case. A floor fails if the
artefact's accuracy is below it. A floor is decidable if the 95 % Wilson interval of n correct images begins above it.
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
UNLIMITED = (SQUARE,)  # conditions that have a limit only if the gate names them

REQUIRE_SIGNATURE = "require_signature"  # a key that only gate files may have

Bools = NDArray[np.bool_]


def load_gate(path: Path) -> Gate:
    """Load the rules of a gate file. Raises InputError for a missing file, and for wrong keys or values."""
    values = read_toml(path)
    values.pop(REQUIRE_SIGNATURE, None)
    return parse(Gate, values, str(path))


def signature_of_gate(path: Path) -> str | None:
    """Return who must have signed the bundle according to a gate file: a file of keys, or IDENTITY,ISSUER; else None.

    A relative path is taken from the gate file's directory. The gate in a bundle's recipe cannot require a signature,
    because the bundle would vouch for itself. Raises InputError for an unreadable file and a value that is no text.
    """
    text = read_toml(path).get(REQUIRE_SIGNATURE)
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(
            f"{path}: {REQUIRE_SIGNATURE} must be a text, the path of a file with a public key or certificates"
        )
    return beside(path, text)


def limit(gate: Gate, name: str) -> float:
    """Return the limit on the drop of accuracy in a condition, in [0, 1]; 1 allows any drop."""
    usual = TIERS[gate.tier].max_drop if gate.max_drop is None else gate.max_drop
    return gate.drops.get(name, 1.0 if name in UNLIMITED else usual)


def significant(name: str) -> float:
    return SIGNIFICANT_OVERALL if name in OVERALL else SIGNIFICANT


def fewest_flips(p: float) -> int:
    """Return the smallest number of newly wrong images, with none newly right, whose p-value is below p."""
    return math.floor(-math.log2(p)) + 1


def least_decidable(n: int) -> float:
    """Return the smallest limit on a drop, in [0, 1], that n images can decide in every condition."""
    return (fewest_flips(SIGNIFICANT) - 1) / n if n else 1.0


def fewest_images(gate: Gate, names: Iterable[str]) -> int:
    """Return the smallest number of images that can decide every floor, and the drops in the conditions `names`."""
    limits = {(limit(gate, name), fewest_flips(significant(name))) for name in names}
    drops = [flips if not share else math.ceil((flips - 1) / share - 1e-9) for share, flips in limits if share < 1]
    floors = [math.ceil(Z95**2 * floor / (1 - floor)) for floor in gate.floors.values() if floor < 1]
    return max([1, *drops, *floors])


def check_gate(gate: Gate, names: Sequence[str], n: int, referenced: Collection[str]) -> None:
    """Raise InputError for a gate that decides nothing, or that has a rule that cannot be decided.

    A rule cannot be decided if its condition is not evaluated, if it limits the drop in a condition without a
    reference, or if n images are too few. names: the conditions that are evaluated; referenced: those of them under
    which the reference has verdicts.
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
    """Whether the drop in a condition exceeds its limit and is significant.

    worse, better: how many of n images are newly wrong and newly right.
    """
    excess = worse - better > limit(gate, name) * n + 1e-9
    return excess and binomial_tail(worse, worse + better) < significant(name)


def failures(gate: Gate, rows: list[Row]) -> list[Reason]:
    """Return a reason for each rule that the artefact breaks, or else the result of `together`.

    Rows with fewer images than others, whose condition ended early, are left out; `lost` judges them.
    """
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
    """Return the drop that exceeds its limit most, if the losses under all conditions with a limit are significant.

    Otherwise the result is empty.
    """
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
    """Return 1 for images that only the artefact gets wrong, -1 for those that only the reference does, else 0: [n]."""
    assert row.reference is not None
    return row.reference.verdicts(row.n).astype(np.int64) - row.artefact.verdicts(row.n)


def lost(gate: Gate, name: str, correct: Bools, reference: Bools | None, n: int) -> str | None:
    """Return why the gate will fail for every outcome on the remaining images; None while it can still pass.

    correct: the artefact's verdicts [m] under the condition `name` on the first m of n images; reference: the
    reference's verdicts [n], None if the drop is not limited.
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
