"""Reports of validations that nobody ran, for tests of how they are written."""

from typing import Any

import numpy as np

from mpdsgr_deploy.attacks.conditions import StrongPGD
from mpdsgr_deploy.attacks.suite_measurement import Measurement, Outcome
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation.example_images import examples
from mpdsgr_deploy.validation.health.check_registry import Check
from mpdsgr_deploy.validation.report import Curve, Point, Report, VariantFlips
from mpdsgr_deploy.validation.rows import Reason, Row, VerdictFlips

N = 200


def row(name: str, correct: int, *, reference: int | None = None, eps: float | None = 0.1, **fields: Any) -> Row:
    """A condition under which the first so many of N images are right."""
    promised, right = None if reference is None else np.arange(N) < reference, np.arange(N) < correct
    settings = f"eps {eps}, 10 steps"
    return Row.of(name, settings, right, eps=eps, reference=promised, evaluations=10 * N, **fields)


def strong(surrogate: str, correct: int) -> Row:
    """A strong attack through a surrogate."""
    return row(f"strong {surrogate}", correct, surrogate=surrogate)


def check(number: int, *, passed: bool = True) -> Check:
    return Check(
        number=number,
        name=f"rule {number} holds",
        state="passed" if passed else "failed",
        saw="what it saw",
        why="numbers would mislead",
        advice="mend it and validate again",
    )


def broken_images(labels: list[str]) -> list:
    rng = np.random.default_rng(0)
    clean = rng.uniform(0.2, 0.8, (8, 1, 8, 8)).astype(np.float32)
    attacked = clean + rng.choice([-0.1, 0, 0.1], clean.shape).astype(np.float32)
    classes = np.arange(8) % 2
    return examples(clean, labels, after_strong_pgd(attacked, classes, before=classes, after=1 - classes))


def after_strong_pgd(attacked: np.ndarray, y: np.ndarray, *, before: np.ndarray, after: np.ndarray) -> Measurement:
    """A measurement under the strong PGD with eps 0.1 alone."""
    strong = Outcome(StrongPGD(name="pgd-strong", eps=0.1), after == y, after, 0, 0, 0, (), attacked, 0.0)
    return Measurement(y, before, (strong,), (before == y) & (after == y))


def sample(**changes: object) -> Report:
    """A report in which every part of the page has something to show."""
    flips = VerdictFlips.of(np.arange(N) < 100, np.arange(N) < 97)
    attackers = [strong(name, 110 + i) for i, name in enumerate(("triangle:0.25", "rectangular", "adaptive"))]
    values = {
        "verdict": "pass",
        "reasons": [],
        "bundle": "digits",
        "network": "vgg-small for digits, trained with REG, T = 3",
        "artefact_file": "model.int8.onnx",
        "artefact_sha256": "a" * 64,
        "backend": "onnxruntime-cpu",
        "precision": "int8",
        "tier": "release",
        "images": f"the first {N} test images of digits",
        "images_sha256": "c" * 64,
        "seed": 0,
        "rows": [
            row("clean", 198, reference=199, eps=0.0),
            row("gaussian", 195, eps=None),
            row("fgsm", 150, reference=151),
            row("pgd-strong", 120, reference=120, surrogate="triangle:1"),
            *attackers,
            row("worst", 113, reference=115),
        ],
        "curves": [
            Curve(attack=name, points=[Point(eps=eps, correct=int(190 * (1 - eps) ** k), n=N) for eps in (0, 0.1, 0.5)])
            for k, name in enumerate(("uniform", "fgsm", "pgd-strong"))
        ],
        "examples": broken_images(["three", "eight"]),
        "variants": [VariantFlips(precision="fp16", n=N, clean=flips, attacked=flips)],
        "parity": Parity(rows=N, max_abs=1e-6, within_tolerance=N, labels_differ=0),
        "health": [check(number) for number in (1, 2, 7, 8, 9)],
        "gate": Gate(floors={"clean": 0.9}),
        "seconds": 12.34,
        "provenance": {"python": "3.12", "packages": {"onnx": "1.23"}, "hardware": {"cpu": "some", "gpus": ["one"]}},
    }
    return Report.model_validate(values | changes)


def failed(verdict: str = "fail", **changes: object) -> Report:
    """The gate refuses it; invalid: two health checks do too."""
    health = [check(1, passed=verdict == "fail"), check(2), check(7, passed=verdict == "fail")]
    reasons = [Reason(check=c.number, text=f"{c.name}: {c.saw}; {c.advice}") for c in health if c.failed]
    complaints = [
        Reason(condition="worst", text="accuracy 56.50% is below the floor 60.00%"),
        Reason(text="200 images, at least 1000 are required"),
    ]
    return sample(verdict=verdict, health=health, reasons=[*reasons, *complaints], **changes)
