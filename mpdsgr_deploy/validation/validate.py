"""The validation stage: bundle in, report out."""

import hashlib
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime import open_predictor, predict
from mpdsgr_deploy.validation import health
from mpdsgr_deploy.validation.conditions import conditions, torch_attackers
from mpdsgr_deploy.validation.gate import Gate
from mpdsgr_deploy.validation.report import Report, Verdict
from mpdsgr_deploy.validation.rows import Row


def validate(
    bundle: Bundle,
    *,
    backend: str,
    precision: str = "fp32",
    data: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    gate: Gate | None = None,
    transfer: Path | None = None,
) -> Report:
    """Attack the bundle's torch model, hand the attacked images to the artefact too, compare image by image.

    data, root, limit override the recipe's test images; transfer is the checkpoint of another network whose attacked
    images are tried as well. The verdict is `invalid` if a health check failed, else
    `fail` if the gate refuses, else `pass`. Raises InputError for missing data, an unknown or unusable backend.
    """
    need("torch", "train")
    from mpdsgr_deploy.runtime.torch_model import TorchModel
    from mpdsgr_deploy.validation.evaluate import other_network

    started = time.monotonic()
    gate = gate or Gate()
    recipe = bundle.manifest.recipe
    config = recipe.validation
    images = _images(bundle, recipe.data, data, root, limit or config.limit)
    x, y = images.unit(), images.classes
    rule = f"the first {len(images)} test images of {data or recipe.data.name}"
    reference = TorchModel.from_bundle(bundle)
    attackers = torch_attackers(reference, recipe.attack, other_network(transfer, images))
    monitor = health.GradientMonitor(attackers.trained)
    attackers = attackers._replace(trained=monitor)
    rows: list[Row] = []
    faults: list[str] = []
    verdicts: dict[str, list[NDArray[np.bool_]]] = {}  # condition -> correct [N] of torch and of the artefact
    with open_predictor(bundle, backend, precision) as artefact:
        for condition in conditions(attackers, x, y, recipe.attack, batch_size=config.batch_size, seed=config.seed):
            logits = [predict(p, condition.images, config.batch_size) for p in (reference, artefact)]
            correct = [answer.argmax(1) == y for answer in logits]
            if condition.name == "clean":
                parity = compare(*logits)
            if condition.eps is not None:
                verdicts[condition.name] = correct
            faults += health.budget_faults(x, condition)
            rows.append(Row.of(condition.name, condition.settings, *correct, eps=condition.eps))
            log.info("%-22s  torch %5.1f %%  artefact %5.1f %%", condition.name, *(100 * c.mean() for c in correct))
        worst = [np.logical_and.reduce(columns) for columns in zip(*verdicts.values(), strict=True)]
        rows.append(Row.of("worst", "right under every condition within eps", *worst, eps=recipe.attack.eps))
        attacked = {name: correct[0] for name, correct in verdicts.items()}
        function = health.check_function(artefact, health.fresh_process(bundle.path, backend, precision), x)
        found = health.attack_checks(faults, rule, attacked, monitor, min(row.n for row in rows))
        checks = sorted([*found, function], key=lambda check: check.number)
    invalid = [f"check {c.number} ({c.name}) failed: {c.saw}; {c.advice}" for c in checks if not c.passed]
    failures = gate.failures(rows)
    verdict: Verdict = "invalid" if invalid else "fail" if failures else "pass"
    file = bundle.manifest.variants[precision].file
    return Report(
        verdict=verdict,
        reasons=[*invalid, *failures],
        bundle=bundle.path.name,
        network=f"{recipe.model.name} for {recipe.data.name}, trained with {recipe.method}, T = {recipe.encoding.T}",
        artefact_file=file,
        artefact_sha256=bundle.manifest.files[file],
        backend=backend,
        precision=precision,
        tier="release",
        images=rule,
        images_sha256=hashlib.sha256(x.tobytes()).hexdigest(),
        seed=config.seed,
        rows=rows,
        parity=parity,
        health=checks,
        gate=gate,
        seconds=time.monotonic() - started,
        provenance=provenance(),
    )


def _images(bundle: Bundle, config: Data, data: str | None, root: str | None, limit: int | None) -> Images:
    """The test images asked for, which must be of the kind the network was made for."""
    changes = {key: value for key, value in (("name", data), ("root", root)) if value is not None}
    images = load_test(config.model_copy(update=changes))
    images.require_kind(data or config.name, bundle.manifest.input_shape, bundle.manifest.labels)
    return images[: limit or len(images)]
