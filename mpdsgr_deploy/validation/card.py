"""Write a model card for the Hugging Face Hub from a bundle and a validation report.

The metadata block follows the Hub's model card specification. Its values are JSON, which is also YAML.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.diagnostics.facts import describe, spans
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.validation.proportions import wilson
from mpdsgr_deploy.validation.report import ModelFacts, Report, accuracy_text, headline_first, load_report

HEADLINE = {CLEAN: "accuracy", WORST: "accuracy under all attacks"}


def report_about(bundle: Bundle, path: Path) -> Report:
    """Load the report at `path`. Raises InputError as `load_report` does, and if it is not about this bundle."""
    report = load_report(path)
    if report.artefact_sha256 not in {bundle.model_sha256(precision) for precision in bundle.manifest.variants}:
        raise InputError(
            f"{path} is the report of another network than {bundle.path}; validate this bundle and give its report"
        )
    return report


def card(bundle: Bundle, report: Report | None = None) -> str:
    """Return the card as Markdown.

    report: the validation of one of the bundle's networks; without it, the card shows the reference's accuracies.
    """
    name = bundle.path.resolve().name
    sections = [
        ["---", *_metadata(bundle, report, name), "---", "", f"# {name}", ""],
        [*_summary(bundle), ""],
        ["## Accuracy", "", *(_accuracy(bundle) if report is None else _verdict(report)), ""],
        ["## Precisions and cost", "", *_precisions(bundle), ""],
        ["## Limits", "", *_limits(bundle, report), ""],
        ["## How it was made", "", *_provenance(bundle)],
    ]
    return "\n".join(line for section in sections for line in section) + "\n"


def _metadata(bundle: Bundle, report: Report | None, name: str) -> Iterator[str]:
    manifest = bundle.manifest
    data = manifest.recipe.data.name
    spiking = ["spiking-neural-network"] if manifest.origin == "trained" else []
    fields: dict[str, Any] = {
        "library_name": "mpdsgr-deploy",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "adversarial-robustness", *spiking],
        "datasets": [data],
    }
    if report is not None:
        metrics = [
            {"type": "accuracy", "name": f"{HEADLINE[row.name]} ({report.images})", "value": row.artefact.accuracy}
            for row in report.rows
            if row.name in HEADLINE and not row.at_most
        ]
        task, dataset = {"type": "image-classification"}, {"type": data, "name": data, "split": "test"}
        fields["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    for key, value in fields.items():
        yield f"{key}: {json.dumps(value)}"


def _summary(bundle: Bundle) -> Iterator[str]:
    manifest = bundle.manifest
    shape = " x ".join(map(str, manifest.input_shape))
    yield (
        f"Classifies images of {shape} (channels, height, width) into {len(manifest.labels)} classes: "
        f"{', '.join(manifest.labels[:10])}{' ...' if len(manifest.labels) > 10 else ''}. Pixels are float32 in "
        "[0, 1]; normalisation is part of the network. It is for images like those it was made for, and for research "
        "on adversarial robustness."
    )
    if manifest.origin == "trained":
        yield ""
        yield from (f"- {key}: {value}" for key, value in describe(manifest.recipe, manifest.time_steps).items())


def _accuracy(bundle: Bundle) -> Iterator[str]:
    promise = bundle.manifest.reference
    if promise is None:
        yield "Not measured: there were no test images when the network was exported."
        return
    yield (
        f"Of the network before its export, on {promise.n} test images of {promise.data}, under attacks of at most "
        f"{bundle.manifest.recipe.attack.eps * 255:.3g}/255 per pixel, tier {promise.tier}."
    )
    yield from ["", "| condition | accuracy in % [95 % interval] |", "|---|---|"]
    for condition, correct in promise.correct.items():
        low, high = wilson(correct, promise.n)
        yield f"| {condition} | {100 * correct / promise.n:.1f} [{100 * low:.1f}, {100 * high:.1f}] |"


def _verdict(report: Report) -> Iterator[str]:
    yield (
        f"Of the deployed file {report.artefact_file} ({report.precision} on {report.backend}), on {report.images}, "
        f"attacks of tier {report.tier}, suite {report.suite}, seed {report.seed}. Verdict: {report.verdict}. `worst` "
        "counts the images that are right under every attack within eps."
    )
    yield from ["", "| condition | eps | accuracy in % [95 % interval] | n |", "|---|---|---|---|"]
    for row in headline_first(report):
        eps = "" if row.eps is None else f"{row.eps * 255:.3g}/255"
        yield f"| {row.name} | {eps} | {accuracy_text(row, report.stopped)} | {row.n} |"


def _precisions(bundle: Bundle) -> Iterator[str]:
    yield "| precision | layers | bytes | numbers held | multiply-accumulates per image |"
    yield "|---|---|---|---|---|"
    for precision, variant in bundle.manifest.variants.items():
        facts = ModelFacts.of(bundle, precision)
        size = bundle.variant(precision).stat().st_size
        layers = spans(variant.layers) if variant.layers else precision
        yield f"| {precision} | {layers} | {size} | {facts.parameters} | {facts.macs} |"


def _limits(bundle: Bundle, report: Report | None) -> Iterator[str]:
    eps = bundle.manifest.recipe.attack.eps * 255
    yield f"- Robustness was measured only for changes of at most {eps:.3g}/255 per pixel (L-infinity)."
    yield "- An accuracy under attack is an upper bound: a stronger attack may lower it."
    if report is None:
        yield "- The deployed file itself was not attacked for this card."
    else:
        yield from (f"- {remark[0].upper()}{remark[1:]}." for remark in report.remarks)
        yield from (f"- {reason.line}." for reason in report.reasons)


def _provenance(bundle: Bundle) -> Iterator[str]:
    manifest = bundle.manifest
    export_facts = manifest.provenance
    versions = ", ".join(f"{package} {version}" for package, version in export_facts.get("packages", {}).items())
    yield f"- sha256 of the manifest: `{manifest.digest}`"
    created, version = (export_facts.get(key, "not recorded") for key in ("created", "mpdsgr_deploy"))
    yield f"- exported: {created}, mpdsgr-deploy {version}"
    yield f"- checkpoint: {export_facts.get('checkpoint', 'not recorded')}"
    if versions:
        yield f"- with {versions}"
