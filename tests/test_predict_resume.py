"""mpdsgr predict that is killed, interrupted or starved: the same command goes on, and every row is written once."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr
from predicting import BATCH, N, answering, folder, job, size, slow, until

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction import workers
from mpdsgr_deploy.prediction.inputs import Inputs
from mpdsgr_deploy.prediction.partial import Partial
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.prediction.writers import FORMATS
from mpdsgr_deploy.runtime import BACKENDS


def test_a_killed_run_goes_on_and_writes_every_row_once_in_any_format(
    slow: Callable[..., "subprocess.Popen[str]"], bundle: Bundle, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Killed at moments that the partial file's size and a die choose; the result is that of an uninterrupted run."""
    caplog.set_level("INFO")
    out, place = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    draw, record = random.Random(0), 40 + 32 / BATCH  # bytes per image
    monkeypatch.setenv("STANDS_STILL", f"{int(0.85 * N * record)}:{place}")  # so that it is killed before its end
    for share in (0, 0.2, 0.6):
        process = slow(bundle.path, folder, "--batch", BATCH, "--out", out)
        until(lambda share=share: size(place) > share * N * record)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.wait()
        assert not out.exists()
    left = place.read_bytes()
    monkeypatch.setitem(BACKENDS.loaded, "slow", BACKENDS["onnxruntime-cpu"])
    for suffix in FORMATS:
        out = tmp_path / f"out{suffix}"
        place = out.with_name(f"{out.name}.partial")
        place.write_bytes(left)
        caplog.clear()
        assert Job(bundle, (folder,), "slow", "fp32", BATCH).to_file(out) == N
        finished = int(caplog.text.split("continuing after the ")[1].split()[0])
        assert 0.5 * N < finished < N
        job(bundle, folder).to_file(tmp_path / f"whole{suffix}")
        assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
        assert not place.exists()


def test_a_run_killed_while_it_writes_the_output_only_writes_it_again(
    bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
import os, signal
from mpdsgr_deploy.prediction import partial
read = partial.Partial.chunks
def killed(self, batches):
    for i, chunk in enumerate(read(self, batches)):
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
partial.Partial.chunks = killed
from mpdsgr_deploy.cli import main
main(["predict", {str(bundle.path)!r}, {str(folder)!r}, "--batch", "{BATCH}", "--out", {str(tmp_path / "o.csv")!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.iterdir())] == [".o.csv.tmp", "o.csv.partial"]
    answering(pytest.fail, monkeypatch)
    assert job(bundle, folder).to_file(tmp_path / "o.csv") == N
    assert [p.name for p in tmp_path.iterdir()] == ["o.csv"]
    assert len((tmp_path / "o.csv").read_text().splitlines()) == N + 1


def test_a_torn_or_damaged_record_is_cut_off_with_what_follows(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.csv.partial"
    values = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    record = 4 * BATCH * 3 + 32
    with Inputs([folder], (1, 8, 8)) as inputs:
        batches = inputs.batches(BATCH)

        def finish(already: int) -> bytes:
            with Partial(place, "settings", 3) as partial:
                assert partial.resume(batches) == already
                for i in range(already, len(batches)):
                    partial.append(batches[i], values[BATCH * i : BATCH * (i + 1)])
                found = list(partial.chunks(batches))
            assert [name for chunk in found for name in chunk.names] == [str(folder / f"{i:02}.png") for i in range(N)]
            assert np.array_equal(np.concatenate([chunk.logits for chunk in found]), values)
            return place.read_bytes()

        whole = finish(0)
        head = len(whole) - len(batches) * record
        for kept in range(0, len(whole), 11):
            place.write_bytes(whole[:kept])
            assert finish(max(0, kept - head) // record) == whole
        for place_of_damage in range(head, len(whole), 37):
            damaged = bytearray(whole)
            damaged[place_of_damage] ^= 1
            place.write_bytes(damaged)
            assert finish((place_of_damage - head) // record) == whole
        place.write_bytes(whole + b"more")
        assert finish(len(batches)) == whole


def test_a_partial_of_something_else_is_not_gone_on_with(
    bundle: Bundle, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in sorted(folder.iterdir())[:12]:
        (photos / file.name).write_bytes(file.read_bytes())
    broken = photos / "09.png"
    good = broken.read_bytes()
    out = tmp_path / "out.csv"

    def fails(job: Job, said: str = "") -> None:
        caplog.clear()
        with pytest.raises(InputError, match=r"cannot decode image .*09\.png"):
            job.to_file(out)
        assert said in caplog.text
        assert (said != "") == ("partial" in caplog.text)

    broken.write_bytes(good[:50])
    fails(job(bundle, photos))  # batches of 4: 8 images are finished
    fails(job(bundle, photos), "continuing after the 8 images")
    fails(job(bundle, photos, batch=3), "starting from the beginning")
    fails(job(bundle, photos, batch=3), "continuing after the 9 images")
    later = 10**18
    os.utime(photos / "07.png", ns=(later, later))  # changed after it was classified
    fails(job(bundle, photos, batch=3), "continuing after the 6 images")
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"digest": "another"}))
    fails(job(other, photos, batch=3), "starting from the beginning")
    os.utime(photos / "00.png", ns=(later, later))
    fails(job(other, photos, batch=3), "starting from the beginning")
    broken.unlink()  # what comes after the finished images may change
    caplog.clear()
    assert job(other, photos, batch=3).to_file(out) == 11
    assert "continuing after the 9 images" in caplog.text
    assert [Path(row["input"]).name for row in csv.DictReader(out.read_text().splitlines())] == [
        f"{i:02}.png" for i in range(12) if i != 9
    ]


def test_a_partial_file_is_ours_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.partial").write_text("my thesis")
    with pytest.raises(InputError, match="was not written by mpdsgr predict"):
        Partial(tmp_path / "mine.partial", "settings", 3)
    assert (tmp_path / "mine.partial").read_text() == "my thesis"
    with Partial(tmp_path / "a", "settings", 3), pytest.raises(InputError, match="written by another mpdsgr predict"):
        Partial(tmp_path / "a", "settings", 3)
    assert not (tmp_path / "a").exists()  # nothing was finished


def test_two_processes_answer_as_one(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    arguments = "predict", bundle.path, folder, "--batch", BATCH, "--processes"
    done = mpdsgr(*arguments, 2, "--out", tmp_path / "2.npz")
    assert done.returncode == 0, done.stderr
    job(bundle, folder).to_file(tmp_path / "1.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    done = mpdsgr(*arguments, 2, "--backend", "onnxruntime-cp", "--out", tmp_path / "o.csv")
    assert_input_error(done, "did you mean 'onnxruntime-cpu'")


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that infer: a child of multiprocessing that is not its resource tracker."""
    found = []
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        except OSError:  # it has just ended
            pass
    return found


def test_a_process_that_dies_ends_the_run_in_one_line_and_it_goes_on(
    slow: Callable[..., "subprocess.Popen[str]"], bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    out, place = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    folders = [folder] * 3  # so that much is left when the process dies
    process = slow(bundle.path, *folders, "--batch", 2, "--processes", 2, "--out", out)
    until(lambda: size(place) > 5 * (80 + 32))
    os.kill(children(process)[0], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    assert_input_error(subprocess.CompletedProcess([], process.returncode, stdout, stderr), "a process died")
    assert not out.exists()
    process = slow(bundle.path, *folders, "--batch", 2, "--out", out)
    _, stderr = process.communicate(timeout=60)
    assert "continuing after the " in stderr
    job(bundle, *folders, batch=2).to_file(tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_processes_do_not_outlive_a_killed_command(
    slow: Callable[..., "subprocess.Popen[str]"], bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    process = slow(bundle.path, *[folder] * 10, "--batch", 1, "--processes", 2, "--out", tmp_path / "out.csv")
    until(lambda: size(tmp_path / "out.csv.partial") > 5 * 72)
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    until(lambda: not any(Path(f"/proc/{worker}/exe").exists() for worker in workers))


def test_each_process_sees_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_gpus() == []
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / address).mkdir(parents=True)
    assert workers.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a")
    assert workers.visible_gpus() == ["5", "GPU-8a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.visible_gpus() == []


@pytest.mark.parametrize("room", [0.5, 1.1])
def test_disk_full(room: float, bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    """A file-size limit makes every larger write fail as a full disk does: of the partial file, of the output."""
    out = tmp_path / "out.npz"
    limit = int(room * N * (40 + 32 / BATCH))
    limited = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from mpdsgr_deploy.cli import main
main()
"""
    out.write_bytes(b"older")
    arguments = ["predict", str(bundle.path), str(folder), "--batch", str(BATCH), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    what = "out.npz.partial" if room < 1 else "out.npz:"
    assert_input_error(done, "cannot write", what, "free some space", "kept" if room < 1 else "unchanged")
    assert out.read_bytes() == b"older"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["out.npz", "out.npz.partial"]
    done = mpdsgr(*arguments)
    assert done.returncode == 0
    assert "continuing after the " in done.stderr
    job(bundle, folder).to_file(tmp_path / "whole.npz")
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_an_interrupt_is_one_line_and_keeps_what_is_finished(
    slow: Callable[..., "subprocess.Popen[str]"], bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    """As Ctrl-C does, the signal reaches every process of the group."""
    place = tmp_path / "out.csv.partial"
    process = slow(bundle.path, *[folder] * 10, "--batch", 1, "--processes", 2, "--out", tmp_path / "out.csv")
    until(lambda: size(place) > 5 * 72 and len(children(process)) == 2)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    # a slow machine writes lines of progress before
    assert said.splitlines()[-1] == "interrupted; results that were finished before are on disk"
    assert "Traceback" not in said
    assert size(place) > 5 * 72
