"""Remarks on the accuracy under all attacks: findings about the network and the tier that are not faults."""

from collections.abc import Iterator

from mpdsgr_deploy.attacks.condition import STRONG, WORST
from mpdsgr_deploy.attacks.suite_measurement import Measurement
from mpdsgr_deploy.attacks.tiers import smaller_tiers
from mpdsgr_deploy.validation.health.check_registry import Convergence
from mpdsgr_deploy.validation.image_checks import FIRST, WELL_KNOWN
from mpdsgr_deploy.validation.subject import Subject

MASKED = 0.1  # a loss of accuracy from strong PGD to all attacks together that counts as gradient masking


def remarks(subject: Subject, measurement: Measurement, convergence: Convergence | None = None) -> list[str]:
    """Return sentences for the report, each a clause without a capital and a full stop.

    After an early stop, these are only the ones that hold without the missing attacks. convergence: the effect of twice
    the steps of the attacks that the worst case rests on; None if not tried.
    """
    if measurement.stopped is not None:
        return list(_unverified_images(subject))
    return [*_masking(measurement), *_upper_bound(subject), *_not_converged(convergence), *_unverified_images(subject)]


def _unverified_images(subject: Subject) -> Iterator[str]:
    if subject.own is None:
        known = f" beyond the first {FIRST}, whose digest is known," if subject.data in WELL_KNOWN else ""
        yield (
            f"images and classes{known} come from the bundle and were not verified, because {subject.data} is not "
            "on this machine; give its directory with --root"
        )


def _masking(measurement: Measurement) -> Iterator[str]:
    strong, worst, n = measurement.verdicts[STRONG], measurement.standing, measurement.n
    gap = (int(strong.sum()) - int(worst.sum())) / n
    if gap >= MASKED:
        yield (
            f"gradient masking: after strong PGD through the surrogate of the training {strong.mean():.1%} of {n} "
            f"images are correct, after all attacks together {worst.mean():.1%}; an evaluation with only that "
            f"surrogate would overstate the robustness by {100 * gap:.1f} points"
        )


def _upper_bound(subject: Subject) -> Iterator[str]:
    """Remark how much lower the reference's worst case was at export under the attacks of a larger tier."""
    reference, compared = subject.reference, subject.comparison.worst
    promise = subject.target.bundle.manifest.reference
    if reference is None or promise is None or compared is None:
        return
    tier, n = subject.gate.tier, len(subject.images)
    if tier in smaller_tiers(promise.tier):
        after_all = int((reference.verdicts[WORST][:n] & compared).sum())
        yield (
            f"worst is an upper bound: at export {int(compared.sum())} of these {n} images were correct after the "
            f"attacks of tier {tier}, and after those of tier {promise.tier} {after_all}"
        )
    elif smaller_tiers(tier) == []:
        yield (
            f"worst is an upper bound, since tier {tier} uses short attacks; export with --tier release to see what "
            "stronger attacks leave"
        )


def _not_converged(convergence: Convergence | None) -> Iterator[str]:
    """Remark how many images twice the steps broke, of those that survived all attacks."""
    if convergence is not None and convergence.broken:
        attacks = ", ".join(convergence.attacks)
        yield (
            f"worst has not converged: on the first {convergence.n} images {attacks} with twice the steps break "
            f"{convergence.broken} of the {convergence.standing} images that were still correct "
            f"({100 * convergence.broken / convergence.n:.1f} points), so longer attacks would break more"
        )
