"""A validation that was killed goes on where it stopped, and nothing of it is taken for another one's."""

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK_GATE, assert_input_error, mpdsgr, mpdsgr_here, perturbed, resealed

from mpdsgr_deploy.attacks import resumable_run
from mpdsgr_deploy.attacks.condition import Batch
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.manifest import Prepared
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.reference import IMAGES, load_images
from mpdsgr_deploy.runtime import OnnxRuntime
from mpdsgr_deploy.validation import Target, validate
from mpdsgr_deploy.validation.report import PROGRESS, Report
from mpdsgr_deploy.validation.rows import Row

GATE = Gate(images=20, max_drop=0.5)
TIMES = {"seconds", "provenance"}


def with_settings(bundle: Bundle, **validation: Any) -> Bundle:
    """The bundle with other settings of validation in its recipe, as if exported so."""
    recipe = bundle.manifest.recipe
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update=validation)})
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"recipe": recipe}))


def with_engine(bundle: Bundle, sha256: str) -> Bundle:
    """The bundle with an engine for the backend that validates it, as if built so."""
    made = Prepared(
        backend="onnxruntime-cpu", precision="fp32", model_sha256="0" * 64, machine={"cpu": "none"}, file="one.plan"
    )
    files = {**bundle.manifest.files, "one.plan": sha256}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"prepared": (made,), "files": files}))


def attempt(bundle: Path, report: Path) -> list[str]:
    """The command's arguments; without the export, which has nothing to go on with after a kill."""
    gate = report.with_suffix(".toml")
    gate.write_text(QUICK_GATE)
    return ["validate", str(bundle), "--gate", str(gate), "--report", str(report), "--no-rebuild"]


def read(report: Path) -> Report:
    return Report.model_validate_json((report / "report.json").read_text())


def bits(row: Row) -> np.ndarray:
    """The artefact's verdicts [n]."""
    return row.artefact.verdicts(row.n)


def kept(report: Path) -> set[str]:
    """Finished batches on disk."""
    return {file.name for file in (report / PROGRESS).rglob("*.npz")}


KILLED_BEHIND = """
import os, signal
from pathlib import Path
from mpdsgr_deploy.attacks.resumable_run import Journal
put = Journal.put

def put_or_die(self, name, part):
    if list(Path({report!r}).rglob({batch!r})):
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, part)

Journal.put = put_or_die
"""


def killed(arguments: Sequence[str], report: Path, batch: str) -> set[str]:
    """Run the command, which is killed at the end of the attack after `batch`, and return what it leaves."""
    done = mpdsgr(*arguments, prelude=KILLED_BEHIND.format(report=str(report), batch=batch))
    assert done.returncode == -signal.SIGKILL, done.stderr
    return kept(report)


class Counted:
    """Batches that were attacked, by their first image; the one after `most` raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> None:
        self.firsts: list[int] = []
        self.most, self._real = most, resumable_run._attacked_rows
        monkeypatch.setattr(resumable_run, "_attacked_rows", self)

    def __call__(self, attack: Any, batch: Batch, *rest: Any) -> Any:
        if len(self.firsts) == self.most:
            raise Stopped
        self.firsts.append(int(batch.places[0]))
        return self._real(attack, batch, *rest)


class Stopped(Exception):  # noqa: N818
    """The test has seen enough."""


@pytest.fixture(scope="module")
def small_batches(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a recipe that validates five images at a time."""
    path = Path(shutil.copytree(bundle.path, tmp_path_factory.mktemp("small") / "bundle"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["recipe"]["validation"] = {**manifest["recipe"]["validation"], "batch_size": 5}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return resealed(path)


@pytest.fixture(scope="module")
def whole(small_batches: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, list[int]]:
    """The report of an uninterrupted validation, and what it attacked."""
    report = tmp_path_factory.mktemp("whole") / "report"
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        done = mpdsgr_here(*attempt(small_batches, report))
    assert done.returncode == 0, done.stderr
    assert not (report / PROGRESS).exists()
    return read(report), counted.firsts


def test_after_a_kill_only_what_is_missing_is_attacked_and_the_report_is_the_same(
    small_batches: Path, whole: tuple[Report, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, attacked = whole
    command = attempt(small_batches, tmp_path / "report")
    left = killed(command, tmp_path / "report", "strong-triangle-2.5-5.npz")
    assert 0 < len(left) < len(attacked)
    counted = Counted(monkeypatch)
    done = mpdsgr_here(*command)
    assert done.returncode == 0, done.stderr
    assert counted.firsts == attacked[len(left) :]
    again = read(tmp_path / "report")
    assert again.model_dump(exclude=TIMES) == report.model_dump(exclude=TIMES)
    assert not (tmp_path / "report" / PROGRESS).exists()


def test_verdicts_hardly_depend_on_the_batch_size(whole: tuple[Report, list[int]], bundle: Bundle) -> None:
    """Not at all but for rounding, which attacks with chaotic gradients amplify."""
    at_once = validate(Target(bundle), gate=GATE)
    different = [bits(a) != bits(b) for a, b in zip(whole[0].rows, at_once.rows, strict=True)]
    assert np.mean(different) <= 0.03


def test_what_another_validation_finished_is_not_taken(
    small_batches: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_bundle(small_batches)
    transfer = perturbed(bundle, tmp_path / "transfer")

    def first(bundle: Bundle = opened, gate: Gate = GATE, **options: Any) -> int:
        """The first image of the first batch that this validation attacks, which it finishes, and then dies."""
        with monkeypatch.context() as patch:
            counted = Counted(patch, 1)
            with pytest.raises(Stopped):
                validate(Target(bundle), gate=gate, report_dir=tmp_path / "report", **options)
        return counted.firsts[0]

    assert first() == 0
    assert first() == 5  # one batch is there
    assert first(with_settings(opened, seed=1)) == 0
    assert first(with_settings(opened, batch_size=6)) == 0
    assert first(gate=GATE.model_copy(update={"tier": "release"})) == 0
    assert first(limit=21) == 0
    assert first(transfer=transfer) == 0
    assert first(transfer=transfer) == 5
    shutil.rmtree(transfer)
    shutil.copytree(bundle.path, transfer)
    assert first(transfer=transfer) == 0  # another network under the same name
    assert first(gate=GATE.model_copy(update={"floors": {"clean": 0.1}})) == 10  # the gate changes no attack
    assert (first(with_engine(opened, "1" * 64)), first(with_engine(opened, "1" * 64))) == (0, 5)
    assert first(with_engine(opened, "2" * 64)) == 0  # another engine in a file of the same name


def test_what_was_finished_on_another_network_is_not_taken(
    small_batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may have got another model under its name, or a library another version: the clean answers show it."""

    moved = load_images(small_batches / IMAGES).unit()[:2]  # as few as rounding may move in a faithful network

    def first(shift: float) -> int:
        """The first image that is attacked where two images are answered with logits moved by `shift`."""
        true = OnnxRuntime.__call__

        def answers(network: OnnxRuntime, x: np.ndarray) -> np.ndarray:
            those = (x[:, None] == moved).all((2, 3, 4)).any(1) & (len(x) == 5)  # not in the golden batch
            return true(network, x) + np.float32(shift) * those[:, None]

        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntime, "__call__", answers)
            counted, target = Counted(patch, 1), Target(open_bundle(small_batches))
            with pytest.raises(Stopped):
                validate(target, gate=GATE, report_dir=tmp_path / "report")
        return counted.firsts[0]

    assert (first(0), first(0)) == (0, 5)
    assert first(1e-3) == 0
    assert first(0) == 0


def test_a_place_that_cannot_be_written_is_one_line(small_batches: Path, tmp_path: Path) -> None:
    command = attempt(small_batches, tmp_path / "report")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / PROGRESS).write_text("in the way")
    assert_input_error(mpdsgr_here(*command), "cannot write", PROGRESS)
    (tmp_path / "file").write_text("not a directory")
    assert_input_error(mpdsgr_here(*attempt(small_batches, tmp_path / "file")), "cannot use", "another place")


def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(small_batches: Path, tmp_path: Path) -> None:
    """A file-size limit makes every larger write fail as a full disk does: of a batch, of the report."""
    report = tmp_path / "report"
    finished = 0
    for limit, what in ((1500, PROGRESS), (8000, "report.html")):
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        done = mpdsgr(*attempt(small_batches, report), prelude=limited)
        assert_input_error(done, "cannot write", what, "free some space")
        assert len(kept(report)) >= finished
        finished = len(kept(report))
        assert not (report / "report.json").exists()
    assert finished > 50
