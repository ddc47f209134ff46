"""The validation stage: bundle in, report out. The artefact is attacked through itself; nothing here needs torch."""

import time
from pathlib import Path

from mpdsgr_deploy.attacks.run import Journal
from mpdsgr_deploy.attacks.suite import TRANSFER, Source, Suite
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.data.likeness import Likeness
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.reference import IMAGES, images_sha256
from mpdsgr_deploy.validation.evaluation import Evaluation
from mpdsgr_deploy.validation.gate import check_gate, resolved
from mpdsgr_deploy.validation.images import evaluation_images
from mpdsgr_deploy.validation.report import PROGRESS, Report, Verdict
from mpdsgr_deploy.validation.target import REMOTE, Target


def validate(
    target: Target,
    *,
    gate: Gate | None = None,
    data: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    transfer: Path | None = None,
    report_dir: Path | None = None,
) -> Report:
    """Attack the artefact through its own gradient, compare with the reference in its bundle, and decide.

    gate: other rules than the recipe's. data, root: the data set's images instead of those in the bundle; limit: the
    first so many. transfer: a bundle or checkpoint whose adversarial images are tried too. report_dir: where finished
    batches are kept, so that the same call goes on after a kill. The verdict is `invalid` if a health check failed,
    else `fail` if the gate refuses, else `pass`.

    Raises InputError for missing data, an unusable backend, or too few images for what the gate asks.
    """
    started = time.monotonic()
    manifest = target.bundle.manifest
    sha256 = target.bundle.model_sha256(target.precision)
    recipe = manifest.recipe
    gate = gate or recipe.gate
    tier = TIERS[gate.tier]
    images = chosen_images(target, limit or gate.images, tier.images, data, root)
    variant = manifest.variants[target.precision]
    warn_if_unlike(target, images)
    images_digest = images_sha256(images)
    with target.open() as artefact, target.sources(transfer) as sources:
        network = Source(artefact, target.trained)
        suite = Suite.of(network, tier.entries, recipe.attack, seed=recipe.validation.seed, transfer=sources)
        reference = target.bundle.reference() if data in (None, recipe.data.name) else None
        evaluation = Evaluation(target, artefact, suite, gate, images, data or recipe.data.name, reference)
        check_gate(gate, evaluation.names, len(images), evaluation.referenced)
        warn_of_gaps(evaluation, target, gate.tier)
        if report_dir is not None:
            evaluation.journal = Journal(report_dir / PROGRESS, evaluation.identity(images_digest, transfer))
        evaluation.attack()
        evaluation.probe(tier.probe)
        health = evaluation.health()
        failures = evaluation.failures()
    invalid = [f"check {c.number} ({c.name}) failed: {c.saw}; {c.advice}" for c in health if not c.passed]
    verdict: Verdict = "invalid" if invalid else "fail" if failures else "pass"
    return Report(
        verdict=verdict,
        reasons=[*invalid, *failures],
        bundle=target.bundle.path.name,
        network=f"{recipe.model.name} for {recipe.data.name}, trained with {recipe.method}, T = {recipe.encoding.T}",
        artefact_file=target.url or variant.file,
        artefact_sha256=sha256,
        attack_sha256=manifest.files.get(variant.attack),
        backend=REMOTE if target.url else target.backend,
        precision=target.precision,
        tier=gate.tier,
        images=evaluation.rule,
        images_sha256=images_digest,
        seed=recipe.validation.seed,
        rows=evaluation.rows,
        curves=evaluation.curves,
        examples=evaluation.examples,
        variants=evaluation.variants(),
        parity=evaluation.parity,
        health=health,
        gate=resolved(gate, len(images)),
        stopped=evaluation.stopped,
        seconds=round(time.monotonic() - started, 1),
        provenance=provenance(),
    )


def warn_if_unlike(target: Target, images: Images) -> None:
    """Say if the images' mean or spread is far from that of the training images: inverted, or of another scale."""
    trained = target.bundle.manifest.pixels
    if trained is not None and (unlike := Likeness(trained).add(images.pixels).warning()):
        log.warning("%s", unlike)


def warn_of_gaps(evaluation: Evaluation, target: Target, tier: str) -> None:
    """Say under which conditions nothing is compared, since the reference never met them or not with these settings."""
    promise = target.bundle.manifest.reference
    alone = [n for n in evaluation.names if n not in evaluation.referenced and not n.startswith(TRANSFER)]
    if promise is not None and evaluation.referenced and alone:
        log.warning(
            "the reference was attacked with tier %s, the artefact is with tier %s: nothing is compared under %s; "
            "validate with --tier %s, or export with --tier %s",
            *(promise.tier, tier, ", ".join(alone), promise.tier, tier),
        )


def chosen_images(target: Target, limit: int | None, usual: int | None, data: str | None, root: str | None) -> Images:
    """The first `limit` test images; without a limit as many as usual, or as there are and the reference answered.

    Raises InputError where there are fewer than `limit`.
    """
    manifest = target.bundle.manifest
    images = evaluation_images(target.bundle, data, root)
    carried = data is None and root is None and IMAGES in manifest.files
    counts = {"the bundle carries" if carried else "the data set has": len(images)}
    if manifest.reference is not None and data in (None, manifest.recipe.data.name):
        counts["the bundle's reference answered"] = manifest.reference.n
    for what, count in counts.items():
        if limit is not None and limit > count:
            more = "say with --root where the data set lies" if carried else "use fewer with --limit"
            advice = more if count == len(images) else "export again with more --limit or --tier"
            raise InputError(f"{what} {count} test images, not {limit}; {advice}")
    return images[: min([*counts.values(), limit or usual or len(images)])]
