"""Reports are ranked where they can be compared, and refused where they cannot."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mpdsgr_deploy.cli.table import command
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments.leaderboard import read_report, render
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.validation.report import ModelFacts, Report
from mpdsgr_deploy.validation.rows import Row

RESULTS = Path(__file__).parent.parent / "train" / "results" / "leaderboard"
N = 40


def report(folder: Path, method: str, clean: int, worst: int, **fields: object) -> Path:
    """A report of N images of which the first so many are right, clean and under all attacks."""
    right = np.arange(N)
    values = {
        "verdict": "pass",
        "reasons": [],
        "bundle": method,
        "network": f"vgg-small for digits, trained with {method}, T = 4",
        "model": ModelFacts(architecture="vgg-small", method=method, steps=4, parameters=66_000, macs=1_000_000),
        "artefact_file": "model.fp32.onnx",
        "artefact_sha256": "",
        "backend": "onnxruntime-cpu",
        "precision": "fp32",
        "tier": "commit",
        "images": "the first 40 test images of digits",
        "images_sha256": "0" * 64,
        "seed": 0,
        "rows": [
            Row.of("clean", "", right < clean),
            Row.of("pgd", "", right < worst + 5, eps=0.1, evaluations=7 * N),
            Row.of("worst", "", right < worst, eps=0.1),
        ],
        "parity": None,
        "health": [],
        "gate": Gate(tier="commit"),
        "seconds": 1.0,
        "provenance": {"hardware": {"cpu": "a CPU", "cores": 2}, "packages": {}, "revision": "0"},
        **fields,
    }
    file = folder / f"{method}.json"
    file.write_text(Report.model_validate(values).model_dump_json())
    return file


def test_what_survives_most_stands_first(tmp_path: Path) -> None:
    files = [
        report(tmp_path, "REG", clean=39, worst=10),
        report(tmp_path, "AT", clean=38, worst=30),
        report(tmp_path, "SR", clean=37, worst=30),
    ]
    done = CliRunner().invoke(command, ["--from", *map(str, files)])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| 1", "| 2", "| 3"))]
    assert [line.split(" | ")[1] for line in lines] == ["AT", "SR", "REG"]
    first, second, third = (line.strip("| ").split(" | ") for line in lines)
    assert first[2:7] == ["vgg-small", "4", "66,000", "1,000,000", "fp32"]
    assert first[-3].startswith("75.0 [")
    assert second[-2] == "1"  # the same images
    assert float(third[-2]) == pytest.approx(2 / 2**20, rel=0.1)  # 20 images that REG alone loses
    assert third[-1] == "7"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"images_sha256": "1" * 64}, "images"),
        ({"tier": "release"}, "tier commit and release"),
        ({"suite": 2}, "attack suite 1 and 2"),
        ({"rows": [Row.of(name, "", np.arange(N) < 9, eps=0.2) for name in ("clean", "pgd", "worst")]}, "eps 0.1 and"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields: dict[str, object], expected: str, tmp_path: Path) -> None:
    files = [report(tmp_path, "REG", 39, 10), report(tmp_path, "AT", 38, 30, **fields)]
    with pytest.raises(InputError, match=expected) as error:
        render([read_report(file) for file in files])
    assert "REG.json and " in str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stopped": {"after": "bim", "why": "a floor is missed"}}, "was stopped early"),
        ({"verdict": "invalid", "reasons": [{"text": "order", "check": 2}]}, r"is not valid \(check 2"),
        ({"schema_version": 99}, "reads"),
    ],
)
def test_a_report_that_proves_nothing_is_refused(fields: dict[str, object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        read_report(report(tmp_path, "REG", 39, 10, **fields))


def test_nothing_to_rank_is_one_line() -> None:
    with pytest.raises(InputError, match="takes validation reports"):
        CliRunner().invoke(command, ["--from"], catch_exceptions=False)


def test_options_that_it_would_ignore_are_refused() -> None:
    with pytest.raises(InputError, match="ignores --seeds, --flips; leave"):
        CliRunner().invoke(command, ["--from", "report", "--flips", "--seeds", "0"], catch_exceptions=False)


def test_the_committed_leaderboard_is_what_its_reports_give() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert len(files) > 2
    assert (RESULTS / "README.md").read_text() == render([read_report(file) for file in files])
