"""Validate a bundle: attack the artefact through its own attack graph, and make the report. Torch is not needed."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.condition import CLEAN, STRONG, WORST, Source
from mpdsgr_deploy.attacks.resumable_run import Journal, classes_of
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.attacks.suite_measurement import Measurement, Stopped, measure
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.manifest import Manifest
from mpdsgr_deploy.parity import Parity, answer_faults, check_answers
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.reference import images_sha256
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.validation import comparison, probes
from mpdsgr_deploy.validation.comparison import compare_conditions, variant_flips
from mpdsgr_deploy.validation.evidence import Rebuild, attacked_evidence, without_attack
from mpdsgr_deploy.validation.example_images import examples
from mpdsgr_deploy.validation.gate import check_gate, failures, limit, lost, significant
from mpdsgr_deploy.validation.health.check_registry import Check, Convergence, Evidence, run_checks
from mpdsgr_deploy.validation.image_checks import chosen_images, own_images
from mpdsgr_deploy.validation.network_file import rounding_faults
from mpdsgr_deploy.validation.proportions import smallest_drop
from mpdsgr_deploy.validation.remarks import remarks
from mpdsgr_deploy.validation.report import PROGRESS, Curve, Example, ModelFacts, Report, VariantFlips, Verdict
from mpdsgr_deploy.validation.rows import EarlyStop, Reason, Row
from mpdsgr_deploy.validation.rules import Rule, check_pins, chosen_tier, settled, stated_rules
from mpdsgr_deploy.validation.subject import Subject, identity, warn_if_unlike, warn_of_gaps
from mpdsgr_deploy.validation.target import REMOTE, Target

TRIED = 100  # images on which a precision's rounding is checked
Floats = NDArray[np.float32]


class Judged(NamedTuple):
    """The results of a validation, from which the report is made together with the subject."""

    measurement: Measurement
    rows: list[Row]
    health: list[Check]
    reasons: list[Reason]
    curves: list[Curve]
    examples: list[Example]
    parity: Parity | None
    convergence: Convergence | None

    @property
    def verdict(self) -> Verdict:
        if any(check.failed for check in self.health):
            return "invalid"
        return "fail" if self.reasons else "pass"


def validate(
    target: Target,
    *,
    gate: Gate | None = None,
    tier: str | None = None,
    data: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    transfer: Path | None = None,
    report_dir: Path | None = None,
    rebuild: Rebuild | None = None,
) -> Report:
    """Attack the artefact through its own gradient, compare it with the bundle's reference, and return the report.

    gate: rules in place of the recipe's.
    tier: how many images are attacked, and how hard; default: the gate's, else the reference's, else the recipe's.
    data, root: name and directory of a data set, whose images are used in place of those in the bundle.
    limit: number of test images, the first ones; default: the gate's, else the tier's.
    transfer: a bundle or checkpoint whose adversarial images are tried too.
    report_dir: keeps finished batches, so that the same call continues after an interruption.
    rebuild: compares the bundle with a new export of its weights (`exporting.rebuild.check_rebuilt`, needs torch).

    The report's verdict is `invalid` if a health check failed, else `fail` if the gate refuses the artefact, else
    `pass`. Raises InputError for missing data, an unusable backend, a network that cannot be attacked, and a gate that
    is for another evaluation or needs more images; EvaluationError if the golden batch is answered wrongly.
    """
    started = time.monotonic()
    recipe = target.bundle.manifest.recipe
    promise = target.bundle.manifest.reference if data in (None, recipe.data.name) else None
    name, tier_from = chosen_tier(tier, gate, recipe, promise.tier if promise else None)
    entries, usual = choose("tier", TIERS, name).entries, TIERS[name].images
    own_gate = gate or recipe.gate
    target.bundle.model_sha256(target.precision)  # raises for an unknown precision before data are read
    images = chosen_images(target.bundle, limit or own_gate.images, usual, data, root)
    rules = settled(own_gate, name, len(images))
    check_pins(rules, recipe, images_sha256(images), len(images))
    warn_if_unlike(target, images)
    own = own_images(target.bundle, images, data, root)
    reference = target.bundle.reference() if data in (None, recipe.data.name) else None
    with target.open() as artefact, target.sources(transfer) as sources:
        network = Source(artefact, target.trained)
        suite = Suite.of(network, entries, recipe.attack, seed=recipe.validation.seed, transfer=sources)
        compared = compare_conditions(reference, suite.conditions, len(images))
        subject = Subject(target, suite, rules, images, data or recipe.data.name, own, reference, compared, None)
        check_gate(rules, subject.names, len(images), compared.names)
        warn_of_gaps(compared, rules.tier, target.bundle)
        if report_dir is not None:
            subject = subject._replace(journal=Journal(report_dir / PROGRESS, identity(subject, transfer)))
        judged = judge(subject, rebuild)
        stopped, x = judged.measurement.stopped, images.unit()
        flips = [] if stopped else variant_flips(target.bundle, x, judged.measurement, subject.batch_size)
    stated = list(stated_rules(gate, rules, recipe, tier_from=tier_from, data=subject.data, n=len(images)))
    return _report(subject, judged, flips, stated, round(time.monotonic() - started, 1))


def judge(subject: Subject, rebuild: Rebuild | None = None) -> Judged:
    """Compute logits, attack, probe some images, run the health checks, and apply the gate, in this order.

    Attacks end early once they cannot change the verdict.
    """
    target, suite, images = subject.target, subject.suite, subject.images
    x, y, size = images.unit(), images.classes, subject.batch_size
    logits = predict(suite.network, x, size, CLEAN)
    clean = classes_of(logits)
    parity = check_answers(subject.reference, target.precision, logits)
    rounding = rounding_faults(target.bundle, target.precision, x[:TRIED])
    wrong = [Reason(text=text) for text in (*answer_faults(parity), *rounding)]
    if subject.journal is not None:
        subject.journal.begin(logits)
    evidence = without_attack(subject, logits, rebuild)
    measurement = measure(
        suite,
        x,
        y,
        clean,
        batch_size=size,
        journal=subject.journal,
        hopeless=partial(_lost, subject),
        stopped=_not_worth_attacking(subject, clean, wrong, run_checks(evidence)),
    )
    rows = comparison.rows(measurement, subject.comparison, target.bundle.manifest.recipe.attack.eps)
    rows = [_with_power(row, subject.gate) for row in rows]
    evidence = attacked_evidence(evidence, subject, measurement)
    curves: list[Curve] = []
    if measurement.stopped is None:
        curves, evidence = _probed(subject, measurement, evidence, x)
    health = run_checks(evidence)
    invalid = [Reason(check=c.number, text=f"{c.name}: {c.saw}; {c.advice}") for c in health if c.failed]
    reasons = [*invalid, *_failures(subject.gate, rows, wrong, measurement.stopped)]
    pictures = examples(x, images.labels, measurement)
    return Judged(measurement, rows, health, reasons, curves, pictures, parity, evidence.convergence)


def _lost(subject: Subject, name: str, correct: NDArray[np.bool_]) -> str | None:
    reference = None if name == WORST else subject.comparison.verdicts.get(name)
    return lost(subject.gate, name, correct, reference, len(subject.images))


def _not_worth_attacking(
    subject: Subject, clean: NDArray[np.int64], wrong: Sequence[Reason], checks: Sequence[Check]
) -> Stopped | None:
    """Return why no attack can change the verdict; None if attacks can change it."""
    if why := _lost(subject, CLEAN, clean == subject.images.classes):
        return Stopped(None, CLEAN, why)
    invalid = [f"check {check.number} ({check.name}) failed" for check in checks if check.failed]
    return next((Stopped(None, None, why) for why in (*(reason.text for reason in wrong), *invalid)), None)


def _probed(subject: Subject, measurement: Measurement, evidence: Evidence, x: Floats) -> tuple[list[Curve], Evidence]:
    """Probe the first of the images x [n, C, H, W]; return curves over eps, and `evidence` with the results."""
    searched = probes.search(subject, measurement, x[: probes.SEARCHED])
    x = x[: TIERS[subject.gate.tier].probe]
    grown = probes.growth(subject, measurement, x)
    more = probes.convergence(subject, measurement, x)
    climb = probes.slopes(subject, measurement, x)
    curves = [Curve.of(name, verdicts) for name, verdicts in grown.items()]
    return curves, replace(evidence, growth=grown[STRONG], convergence=more, slopes=climb, search=searched)


def _with_power(row: Row, gate: Gate) -> Row:
    """Return the row with its `detectable` filled in, if there are flips over all attacks and images."""
    if row.flips is None or row.at_most:
        return row
    allowed, flips = limit(gate, row.name), row.flips
    drop = smallest_drop(row.n, allowed, flips.newly_wrong, flips.newly_right, significant(row.name))
    return row.model_copy(update={"detectable": drop})


def _failures(gate: Gate, rows: list[Row], wrong: Sequence[Reason], stopped: Stopped | None) -> list[Reason]:
    """Return the rules of the gate that the artefact breaks, the reasons `wrong`, and why attacks ended early."""
    broken = [*failures(gate, rows), *wrong]
    if stopped and stopped.condition and stopped.condition not in {reason.condition for reason in broken}:
        broken.append(Reason(condition=stopped.condition, text=stopped.why))
    return broken


def _origin(manifest: Manifest) -> str:
    elsewhere = {"adopted": "adopted as an ONNX file", "module": "exported from a torch module"}
    return elsewhere.get(manifest.origin) or f"trained with {manifest.recipe.method}"


def _report(subject: Subject, judged: Judged, flips: list[VariantFlips], rules: list[Rule], seconds: float) -> Report:
    target, gate = subject.target, subject.gate
    manifest, stopped = target.bundle.manifest, judged.measurement.stopped
    recipe, variant = manifest.recipe, manifest.variants[target.precision]
    why = "" if stopped is None else ": ".join(filter(None, [stopped.condition, stopped.why]))
    return Report(
        verdict=judged.verdict,
        reasons=judged.reasons,
        bundle=target.bundle.path.name,
        bundle_sha256=manifest.digest,
        signer=target.bundle.signed.signer if target.bundle.signed else None,
        network=f"{recipe.model.name} for {recipe.data.name}, {_origin(manifest)}, {manifest.time_steps}",
        model=ModelFacts.of(target.bundle, target.precision),
        artefact_file=target.url or variant.file,
        artefact_sha256=target.bundle.model_sha256(target.precision),
        backend=REMOTE if target.url else target.backend,
        precision=target.precision,
        tier=gate.tier,
        suite=TIERS[gate.tier].suite,
        images=subject.rule,
        images_sha256=images_sha256(subject.images),
        seed=recipe.validation.seed,
        rows=judged.rows,
        curves=judged.curves,
        examples=judged.examples,
        variants=flips,
        parity=judged.parity,
        health=judged.health,
        remarks=remarks(subject, judged.measurement, judged.convergence),
        gate=gate,
        rules=rules,
        stopped=None if stopped is None else EarlyStop(after=stopped.during, why=why),
        seconds=seconds,
        provenance=provenance(),
    )
