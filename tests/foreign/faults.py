"""Plants faults in how a foreign network is adopted, and asks the whole gate; writes faults.json beside this file.

    python tests/foreign/faults.py

None may end in exit code 0 with a robust accuracy that the Square attack, which needs no gradient, then breaks. Square
with 5,000 queries breaks images that the release tier kept without any fault, too; so a fault counts as let through if
the gate passes it and, image by image, it kept significantly more than the gate keeps without a fault, or Square then
breaks significantly more of them (`let_through`).
"""

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from planted import FAULTS, HERE, NETWORK, Patch, twice, written
from recording import record

from mpdsgr_deploy.attacks.square import square
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.cli import main as mpdsgr
from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.runtime import OnnxRuntime, open_predictor
from mpdsgr_deploy.validation.report import load_report

SURROGATE, EPS, QUERIES, SEED = "arctan:2", 8 / 255, 5000, 1


def adopt_words(name: str, folder: Path, images: Images, tier: str) -> list[object]:
    """The command that adopts the network of a case."""
    words: list[object] = ["adopt", written(name, folder), "--images", "digits", "--limit", len(images)]
    words += ["--surrogate", SURROGATE, "--tier", tier, "--out", folder / "bundle"]
    if FAULTS[name] is twice:
        words += ["--range", "0,4"]
    if FAULTS[name] is twice and "without" not in name:
        with OnnxRuntime(HERE / f"{NETWORK}.onnx") as network:
            np.savez(folder / "logits.npz", logits=network(images.unit()))
        words += ["--reference", folder / "logits.npz"]
    return words


def invoke(words: Iterable[object], folder: Path) -> tuple[int, str]:
    """The exit code of a command, and its last line without the folder's name."""
    done = CliRunner().invoke(mpdsgr, [str(word) for word in words])
    assert "this is a bug" not in done.output, done.output  # of the fault itself, which says nothing about the gate
    return done.exit_code, done.output.strip().splitlines()[-1].replace(str(folder), "")


def judged(name: str, n: int, tier: str) -> dict[str, Any]:
    """Adopt and validate with a fault, then attack what was kept by queries."""
    images = load_test(Data(name="digits"))[:n]
    with tempfile.TemporaryDirectory() as place, Patch.context() as patch:
        folder = Path(place)
        words = adopt_words(name, folder, images, tier)
        FAULTS[name](patch)
        code, line = invoke(words, folder)
        if code:
            return {"adopt": code, "ended": code, "said": line}
        gate = folder / "gate.toml"
        gate.write_text(f'tier = "{tier}"\nimages = {n}\nmax_drop = 0.2\n')
        words = ["validate", folder / "bundle", "--gate", gate, "--report", folder / "report"]
        ended, line = invoke(words, folder)
        if ended == 2:
            return {"adopt": 0, "ended": 2, "said": line}
        report = load_report(folder / "report")
        row = report.row("worst")
        assert row is not None
        assert row.n == n
        kept = np.flatnonzero(row.artefact.verdicts(n))
        with open_predictor(open_bundle(folder / "bundle")) as predictor:
            x, y = images.unit()[kept], images.classes[kept]
            standing = square(predictor, x, y, eps=EPS, queries=QUERIES, seed=SEED).standing
        said = "; ".join(reason.line for reason in report.reasons)
        broken = kept[~standing]
        return {"adopt": 0, "ended": ended, "said": said, "kept": kept.tolist(), "square breaks": broken.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--tier", default="release")
    options = parser.parse_args()
    setting = {"n": options.images, "tier": options.tier, "eps": EPS, "queries": QUERIES, "seed": SEED}
    cases: Mapping[str, Any] = {name: partial(judged, name, options.images, options.tier) for name in FAULTS}
    record("faults", {**setting, "network": NETWORK, "surrogate": SURROGATE}, cases)


if __name__ == "__main__":
    main()
