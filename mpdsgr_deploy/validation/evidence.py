"""Gather the evidence for the health checks from logits and measurements."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, WORST, Condition
from mpdsgr_deploy.attacks.resumable_run import NOT_FINITE
from mpdsgr_deploy.attacks.suite_measurement import Measurement
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.onnx_files import read_network, rounds_outputs
from mpdsgr_deploy.validation.gate import limit
from mpdsgr_deploy.validation.health.check_registry import Evidence, Reach, Rebuilt
from mpdsgr_deploy.validation.image_checks import image_faults
from mpdsgr_deploy.validation.rows import VerdictFlips
from mpdsgr_deploy.validation.subject import Subject

Rebuild = Callable[[Bundle], list[str]]  # returns how a bundle's files differ from a new export of its weights


def without_attack(subject: Subject, logits: NDArray[np.float32], rebuild: Rebuild | None = None) -> Evidence:
    """Return the evidence that needs no attack. logits: the artefact's logits [n, K] of the clean images."""
    images, compared = subject.images, subject.comparison
    reach = Reach(reference=True, missing=compared.missing, contradictions=compared.contradictions)
    floors = "floors" if subject.gate.floors else ""
    return Evidence(
        rule=subject.rule,
        n=len(images),
        against=floors if subject.reference is None else "the reference",
        reach=reach if reach.missing or reach.contradictions else None,
        logits=logits,
        rounded_outputs=rounds_outputs(read_network(subject.target.bundle.variant(subject.target.precision))),
        image_faults=image_faults(subject.data, images, subject.reference, subject.own),
        not_finite={CLEAN: np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist()},
        foreign=subject.target.foreign_parts(),
        classes=images.classes,
        labels=images.labels,
        rebuilt=None if rebuild is None else rebuilt(rebuild, subject.target.bundle),
    )


def rebuilt(rebuild: Rebuild, bundle: Bundle) -> Rebuilt:
    """Return the result of `rebuild`, or the reason why the bundle cannot be exported again."""
    try:
        return Rebuilt(rebuild(bundle))
    except InputError as error:
        return Rebuilt(unknown=str(error))


def attacked_evidence(evidence: Evidence, subject: Subject, measurement: Measurement) -> Evidence:
    """Return `evidence` with that from the attacks; after an early stop, without what needs all attacks."""
    target = subject.target
    engines = [made.batch for made in target.bundle.prepared(target.backend, target.precision) if made.batch]
    evidence = replace(
        of_attacks(evidence, measurement, subject.suite.conditions, target.trained),
        artefact=subject.suite.network,
        fresh=target.fresh(),
        x=subject.images.unit(),
        batch_sizes=[subject.batch_size, *(largest for _, _, largest in engines)],
    )
    if measurement.stopped is not None:
        return evidence
    compared = subject.comparison
    reach = Reach(
        reference=subject.reference is not None,
        flips=compared.paired_worst(measurement),
        missing=compared.missing,
        alone=compared.alone,
        allowed=limit(subject.gate, WORST),
        contradictions=compared.contradictions,
        each={name: VerdictFlips.of(compared.verdicts[name], measurement.verdicts[name]) for name in compared.attacks},
    )
    return replace(evidence, reach=reach)


def of_attacks(evidence: Evidence, measurement: Measurement, conditions: Sequence[Condition], trained: str) -> Evidence:
    """Return `evidence` with that from attacks on a torch or an exported network. trained: the training surrogate."""
    attacked = {o.condition.name: np.flatnonzero(o.predicted == NOT_FINITE).tolist() for o in measurement.outcomes}
    clean = np.flatnonzero(measurement.clean == NOT_FINITE).tolist()
    evidence = replace(
        evidence,
        budget_faults=[fault for outcome in measurement.outcomes for fault in outcome.faults],
        not_finite={CLEAN: clean, **attacked},
    )
    if measurement.stopped is not None:
        return evidence
    through_trained = [
        o for o in measurement.outcomes if o.condition.kind == "gradient" and o.condition.surrogate == trained
    ]
    within = [condition for condition in conditions if condition.eps is not None]
    return replace(
        evidence,
        verdicts=measurement.verdicts,
        black_box=[condition.name for condition in within if condition.kind in ("query", "transfer")],
        white_box=[condition.name for condition in within if condition.kind == "gradient"],
        surrogates=[condition.surrogate for condition in conditions if condition.kind == "gradient"],
        trained=trained,
        gradients=(
            sum(outcome.evaluations for outcome in through_trained),
            sum(outcome.zero for outcome in through_trained),
            sum(outcome.not_finite for outcome in through_trained),
        ),
    )
