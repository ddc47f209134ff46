"""Pair the recorded verdicts of two networks on the same images under the same attacks.

A report has the verdicts of the deployed file, a bundle those of the torch network from which it was exported. A
condition is paired if both sides give it the same name and settings; the attacker's surrogate may differ, because it
belongs to the network. The worst case is taken over the paired attacks within eps.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, CW, GAUSSIAN, WORST
from mpdsgr_deploy.attacks.suite_measurement import union
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.pairs.side import Side
from mpdsgr_deploy.reference import images_sha256
from mpdsgr_deploy.validation.image_checks import evaluation_images
from mpdsgr_deploy.validation.report import Report
from mpdsgr_deploy.validation.rows import VerdictFlips

Bools = NDArray[np.bool_]
REFERENCE = "fp32"  # the precision whose verdicts a bundle has
UNBOUNDED = {CLEAN, GAUSSIAN, CW, WORST}  # conditions that do not count towards the worst case
SURROGATE = re.compile(r", through [^,]+$")  # the surrogate, at the end of a condition's settings


class PairedVerdict(NamedTuple):
    """Both networks under one condition on the same n images.

    right: the number of right answers of A and of B; flips: newly wrong are images that only A gets right, newly right
    those that only B gets right.
    """

    condition: str
    n: int
    right: tuple[int, int]
    flips: VerdictFlips

    @classmethod
    def of(cls, condition: str, a: Bools, b: Bools) -> "PairedVerdict":
        """Pair the verdicts [n] of A and B under a condition; True is a right answer."""
        return cls(condition, len(a), (int(a.sum()), int(b.sum())), VerdictFlips.of(a, b))


def paired_verdicts(a: Side, b: Side, root: str | None = None) -> tuple[list[PairedVerdict], str]:
    """Return the pairs of all conditions that both sides have, and a text that says which attacks are left out, or "".

    root: the directory of the data set, if a bundle does not carry its images. Raises InputError if a side has no
    verdicts, and if the images are not the same.
    """
    left, right = recorded(a), recorded(b)
    n = images_in_common(a, b, root)
    common = [condition for condition in left if condition in right and condition[0] != CLEAN]
    reason = ""
    if a.report and b.report and a.report.tier == b.report.tier and a.report.suite != b.report.suite:
        common, reason = [], f"attack suite {a.report.suite} and {b.report.suite}"
    elif eps(a) != eps(b):
        common, reason = [], f"eps {eps(a)} and {eps(b)}"
    attacks = {name: (left[name, settings][:n], right[name, settings][:n]) for name, settings in common}
    clean = left[CLEAN, ""][:n], right[CLEAN, ""][:n]
    pairs = {CLEAN: clean, **attacks}
    names = [name for name in attacks if name not in UNBOUNDED]
    if names:
        worst = [union({name: verdicts[side] for name, verdicts in pairs.items()}, (CLEAN, *names)) for side in (0, 1)]
        pairs[f"{WORST} of these"] = worst[0], worst[1]
    unpaired = sorted({name for name, _ in (*left, *right)} - pairs.keys() - {WORST})
    if unpaired and not reason:
        reason = f"{', '.join(unpaired)}: only one side was attacked with these settings"
    return [PairedVerdict.of(name, *verdicts) for name, verdicts in pairs.items()], reason


def recorded(side: Side) -> Mapping[tuple[str, str], Bools]:
    """Return verdicts [n], True for right answers, by condition and settings without the surrogate.

    Raises InputError if the side has none.
    """
    if side.report is not None:
        n = side.report.rows[0].n
        complete = [row for row in side.report.rows if row.n == n and not row.at_most and row.name != WORST]
        verdicts = {(row.name, row.settings): row.artefact.verdicts(n) for row in complete}
    else:
        if side.precision not in ("", REFERENCE):
            raise InputError(f"a bundle holds no results of {side.precision}; compare reports of `mpdsgr validate`")
        reference = side.bundle.reference() if side.bundle else None
        if reference is None:
            raise InputError(f"{side.name} holds no results of attacks; compare reports of `mpdsgr validate`")
        settings = {CLEAN: "", **reference.settings}
        verdicts = {(name, how): reference.verdicts[name] for name, how in settings.items() if name != WORST}
        verdicts |= reference.nested
    return {(name, "" if name == CLEAN else SURROGATE.sub("", how)): right for (name, how), right in verdicts.items()}


def eps(side: Side) -> float | None:
    """Return the bound eps of the side's recorded attacks."""
    if side.report is not None:
        return side.report.eps
    return side.recipe.attack.eps if side.recipe else None


def images_in_common(a: Side, b: Side, root: str | None) -> int:
    """Return how many first images both sides have verdicts on. Raises InputError if they are not the same images."""
    if a.report is not None and b.report is not None:
        if a.report.images_sha256 != b.report.images_sha256:
            raise InputError(f"the two used different images: {_images(a.report)}, and {_images(b.report)}")
        return min(side.rows[0].n for side in (a.report, b.report))
    if a.bundle is not None and b.bundle is not None:
        left, right = (bundle.reference() for bundle in (a.bundle, b.bundle))
        assert left is not None
        assert right is not None
        n = min(len(left.digests), len(right.digests))
        if not np.array_equal(left.digests[:n], right.digests[:n]):
            raise InputError(f"{a.name} and {b.name} were measured on different images")
        return n
    report, bundle = (a.report, b.bundle) if a.report is not None else (b.report, a.bundle)
    assert report is not None
    assert bundle is not None
    n, images = report.rows[0].n, evaluation_images(bundle, None, root)
    reference = bundle.manifest.reference
    if reference is None or n > reference.n or images_sha256(images[:n]) != report.images_sha256:
        raise InputError(f"the two used different images: {_images(report)}, and those of the bundle {bundle.path}")
    return n


def _images(report: Report) -> str:
    return f"{report.images} (sha256 {report.images_sha256[:8]})"
