"""Evidence about a served network from its bundle and a report beside it: its training and its robustness."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.signing.verdict import Vouched


def evidence(
    bundle: Bundle, precision: str, golden: NDArray[np.float32], vouched: Vouched | None = None
) -> dict[str, Any]:
    """Return what /status shows of a network. methods: those of its training; reference: counts of right answers.

    golden: float32 [G, C, H, W], whose mean tells a viewer whether images are light on dark. validation: of the newest
    report beside the bundle that is about this network; None without one, and if signatures are demanded. signature:
    who signed the bundle and, with the counts of its conditions, a verdict on it; None if no signature was demanded,
    and so none was verified.
    """
    manifest, promise = bundle.manifest, bundle.manifest.reference
    reference = None
    if promise is not None:
        reference = {
            "data": promise.data,
            "n": promise.n,
            "clean": promise.correct.get("clean"),
            "worst": promise.correct.get("worst"),
            "eps": manifest.recipe.attack.eps,
        }
    return {
        "digest": manifest.digest,
        "methods": sorted(name for name, settings in dict(manifest.recipe.defence).items() if settings is not None),
        "time_steps": manifest.time_steps if manifest.origin == "trained" else None,
        "reference": reference,
        "golden_mean": round(float(golden.mean()), 4),
        "validation": None if bundle.signed else _validation(bundle, precision),
        "signature": bundle.signed and _signature(bundle.signed.signer, vouched),
    }


def _signature(signer: str, vouched: Vouched | None) -> dict[str, Any]:
    verdict = None if vouched is None else {"line": vouched.verdict.line, "correct": vouched.verdict.counts()}
    return {"signer": signer, "verdict": verdict}


def _validation(bundle: Bundle, precision: str) -> dict[str, Any] | None:
    path, sha = bundle.path.absolute(), bundle.model_sha256(precision)
    places = [path.with_name(f"{path.name}-report"), path.parent / "report", *_inside(path.parent / "reports")]
    reports = [file for place in places if (file := place / "report.json").is_file()]
    for file in sorted(reports, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            report = json.loads(file.read_bytes())
            if report["artefact_sha256"] == sha:
                return {key: str(report[key]) for key in ("verdict", "tier", "backend", "images")}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no report of ours
    return None


def _inside(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
