"""Pair the verdicts of a measurement with those of the bundle's reference, under equal attacks on equal images.

A reference has verdicts under the conditions of the tier it was exported with, and of the smaller tiers. Verdicts under
attacks with other settings are not compared. The worst case is compared over the attacks that both networks met.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, STRONG, WORST, Condition
from mpdsgr_deploy.attacks.suite_measurement import Measurement, union
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.reference import Reference
from mpdsgr_deploy.runtime import open_predictor, predict
from mpdsgr_deploy.validation.report import VariantFlips
from mpdsgr_deploy.validation.rows import TRANSFERRED, Row, VerdictFlips

Bools = NDArray[np.bool_]
MUST_BE_COMPARED = "strong-pgd"  # the attack whose settings are the same in all tiers, except for restarts


@dataclass(frozen=True)
class Comparison:
    """The reference's verdicts, and which conditions of an evaluation they cover.

    verdicts: bool [n] by condition, for clean images and the conditions that the reference met too; empty without a
    reference. attacks: conditions within eps that both meet. alone: conditions that only the artefact meets. transfer:
    transferred attacks, which the reference never meets. missing: attacks that must be compared for a valid verdict,
    but are not. contradictions: number of images that the reference counts as right in the worst case although one of
    its attacks broke them.
    """

    verdicts: Mapping[str, Bools]
    attacks: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    transfer: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    contradictions: int = 0

    @property
    def names(self) -> list[str]:
        """The names of all conditions that are compared, including the worst case."""
        return [*self.verdicts, *([WORST] if self.attacks else [])]

    @property
    def worst(self) -> Bools | None:
        """The reference's worst case [n] over the attacks that both met; None if there are none."""
        return union(self.verdicts, (CLEAN, *self.attacks)) if self.attacks else None

    def paired_worst(self, measurement: Measurement) -> VerdictFlips | None:
        """Return the flips of the worst case over `attacks`, to which the artefact's adds the transferred attacks.

        None without common attacks, and for a measurement that stopped early.
        """
        if self.worst is None or measurement.stopped is not None:
            return None
        return VerdictFlips.of(self.worst, union(measurement.verdicts, (CLEAN, *self.attacks, *self.transfer)))


def compare_conditions(reference: Reference | None, conditions: Sequence[Condition], n: int) -> Comparison:
    """Find the reference's verdicts on the first n images under these conditions.

    reference: None if it has no verdicts on these images.
    """
    within = [c for c in conditions if c.eps is not None]
    transfer = tuple(c.name for c in within if c.kind == "transfer")
    if reference is None:
        return Comparison({}, alone=tuple(c.name for c in conditions if c.kind != "transfer"), transfer=transfer)
    settings = {c.name: c.settings for c in conditions if c.kind != "transfer"}
    met = {name: reference.under(name, how) for name, how in settings.items()}
    verdicts = {name: correct[:n] for name, correct in met.items() if correct is not None}
    attacks = tuple(c.name for c in within if c.name in verdicts)
    # the reference's worst case is over the attacks of its own tier, not over those of smaller tiers
    of_own_tier = [name for name in attacks if reference.settings.get(name) == settings[name]]
    stands = union({CLEAN: reference.verdicts[CLEAN][:n], **verdicts}, (CLEAN, *of_own_tier))
    return Comparison(
        {CLEAN: reference.verdicts[CLEAN][:n], **verdicts},
        attacks,
        alone=tuple(name for name, correct in met.items() if correct is None),
        transfer=transfer,
        missing=tuple(c.name for c in within if c.method == MUST_BE_COMPARED and c.name not in verdicts),
        contradictions=int((reference.verdicts[WORST][:n] & ~stands).sum()),
    )


def rows(measurement: Measurement, comparison: Comparison, eps: float) -> list[Row]:
    """Return the report's rows: the clean images, every measured condition, and the worst case within `eps`."""
    stopped, n = measurement.stopped, measurement.n
    reason = "the reference was not attacked in this way" if comparison.verdicts else "no reference for these images"
    made = [
        Row.of(
            CLEAN,
            "test images as they are",
            measurement.verdicts[CLEAN],
            eps=0.0,
            reference=comparison.verdicts.get(CLEAN),
            not_compared=reason,
        )
    ]
    for outcome in measurement.outcomes:
        condition, attacked = outcome.condition, len(outcome.correct)
        promised = comparison.verdicts.get(condition.name)
        made.append(
            Row.of(
                condition.name,
                condition.settings,
                outcome.correct,
                eps=condition.eps,
                reference=None if promised is None else promised[:attacked],
                evaluations=outcome.evaluations,
                surrogate=condition.surrogate if condition.swept else None,
                at_most=attacked < n,
                not_compared=TRANSFERRED if condition.kind == "transfer" else reason,
            )
        )
    bound = "; stopped early, so an upper bound" if stopped else ""
    over = ""
    if comparison.attacks and comparison.alone:
        over = f"; compared over those {len(comparison.attacks)} attacks that the reference was attacked with"
    worst = Row.of(
        WORST,
        f"correct under every condition within eps{bound}{over}",
        measurement.standing,
        eps=eps,
        reference=None if stopped else comparison.worst,
        flips=comparison.paired_worst(measurement),
        at_most=stopped is not None,
        not_compared="stopped early" if stopped else reason,
    )
    return [*made, worst]


def variant_flips(
    bundle: Bundle, x: NDArray[np.float32], measurement: Measurement, batch_size: int
) -> list[VariantFlips]:
    """Compare every reduced precision of the bundle with float32, on images x [n, C, H, W] and attacked ones.

    The attacked images are those that the strong PGD made from x on the measured network. The result is empty without
    them, and for a bundle with one precision.
    """
    strong = measurement.outcome(STRONG)
    if len(bundle.manifest.variants) == 1 or strong is None or strong.images is None:
        return []
    verdicts: dict[str, list[NDArray[np.bool_]]] = {}
    for precision in bundle.manifest.variants:
        with open_predictor(bundle, precision=precision) as network:
            answers = (predict(network, images, batch_size, precision) for images in (x, strong.images))
            verdicts[precision] = [logits.argmax(1) == measurement.y for logits in answers]
    clean, attacked = verdicts.pop("fp32")
    return [
        VariantFlips(
            precision=precision,
            n=measurement.n,
            clean=VerdictFlips.of(clean, correct[0]),
            attacked=VerdictFlips.of(attacked, correct[1]),
        )
        for precision, correct in verdicts.items()
    ]
