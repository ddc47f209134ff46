"""mpdsgr predict: every format, inputs of any size, and runs that are killed, starved or fed with broken files."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet
import pytest
import torch
from conftest import assert_input_error, mpdsgr
from PIL import Image

from mpdsgr_deploy.bundle import Bundle, NoiseInput
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError, OutOfMemory
from mpdsgr_deploy.prediction import workers
from mpdsgr_deploy.prediction.inputs import ArrayFile, Inputs
from mpdsgr_deploy.prediction.partial import Chunk, Partial
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.prediction.writers import FORMATS, find_writer
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import BACKENDS, NoiseSource, OnnxRuntime, open_predictor
from mpdsgr_deploy.runtime.openvino import OpenVino
from mpdsgr_deploy.runtime.torch_model import TorchModel

N, BATCH = 60, 4

# The command with a backend that takes its time, so that it can be hit in the middle.
SLOW_COMMAND = """
import signal
import time
from contextlib import contextmanager
from mpdsgr_deploy.runtime.open import BACKENDS

@contextmanager
def slow(bundle, precision, noise):
    with BACKENDS["onnxruntime-cpu"](bundle, precision, noise) as predictor:
        def answer(x):
            time.sleep(0.03)
            return predictor(x)
        yield answer

BACKENDS["slow"] = slow
if __name__ == "__main__":
    from mpdsgr_deploy.cli import main
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    main()
"""


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(load_test(bundle.manifest.recipe.data)[:N].pixels):
        Image.fromarray(pixels[0]).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def logits(bundle: Bundle) -> np.ndarray:
    """What the network says of the folder, batch by batch, without any of the machinery under test."""
    x = load_test(bundle.manifest.recipe.data)[:N].unit()
    with open_predictor(bundle) as predictor:
        return np.concatenate([predictor(x[i : i + BATCH]) for i in range(0, N, BATCH)])


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start the slow command, a process group of its own; what still runs of it at the end is killed."""
    (tmp_path / "slow.py").write_text(SLOW_COMMAND)
    running = []

    def start(*arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, tmp_path / "slow.py", "predict", *map(str, arguments), "--backend", "slow"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, **pipes, process_group=0))
        return running[-1]

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def job(bundle: Bundle, *paths: Path, batch: int = BATCH, top: int = 1) -> Job:
    return Job(bundle, paths, "onnxruntime-cpu", "fp32", batch, top=top)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def answering(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline meet a predictor of the test's own."""
    monkeypatch.setattr(workers, "open_predictor", lambda *_: nullcontext(predictor))


@pytest.mark.parametrize("top", [1, 3])
def test_every_format_holds_the_best_labels(
    top: int, bundle: Bundle, folder: Path, logits: np.ndarray, tmp_path: Path
) -> None:
    for suffix in FORMATS:
        if (suffix, top) != (".npz", 3):
            assert job(bundle, folder, top=top).to_file(tmp_path / f"out{suffix}") == N
    names = [str(folder / f"{i:02}.png") for i in range(N)]
    share = torch.softmax(torch.from_numpy(logits), 1).topk(top)
    labels = [[bundle.manifest.labels[k] for k in row] for row in share.indices]
    ranks = [""] if top == 1 else ["_1", "_2", "_3"]
    columns = ["input", *(f"{what}{rank}" for rank in ranks for what in ("label", "probability"))]

    rows = list(csv.reader((tmp_path / "out.csv").read_text().splitlines()))
    assert rows[0] == columns
    assert [row[0] for row in rows[1:]] == names
    assert [row[1::2] for row in rows[1:]] == labels
    np.testing.assert_allclose(np.array([row[2::2] for row in rows[1:]], float), share.values, atol=1e-6)

    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert list(lines[0]) == (["input", "label", "probability"] if top == 1 else ["input", "labels", "probabilities"])
    assert [line["input"] for line in lines] == names
    assert [line["label" if top == 1 else "labels"] for line in lines] == [r[0] if top == 1 else r for r in labels]
    found = [line["probability" if top == 1 else "probabilities"] for line in lines]
    np.testing.assert_allclose(np.reshape(found, (N, top)), share.values, atol=1e-6)

    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == columns
    assert table["input"].to_pylist() == names
    assert [list(row) for row in zip(*(table[f"label{rank}"].to_pylist() for rank in ranks), strict=True)] == labels
    np.testing.assert_allclose(
        np.stack([table[f"probability{rank}"].to_numpy() for rank in ranks], 1), share.values, atol=1e-6
    )

    if top == 1:
        with np.load(tmp_path / "out.npz") as arrays:
            assert arrays["inputs"].tolist() == names
            assert np.array_equal(arrays["logits"], logits)
            assert arrays["classes"].tolist() == logits.argmax(1).tolist()
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))


def test_equal_logits_are_told_apart_by_class_and_names_by_their_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")  # no UTF-8
    chunks = [
        Chunk([name, "b"], np.array([[1, 3, 3], [2, 2, 2]], np.float32)),
        Chunk(["long name"], np.eye(1, 3, 2, "f")),
    ]
    for suffix in FORMATS:
        with (tmp_path / f"a{suffix}").open("wb") as file:
            find_writer(suffix, ("x", "y", "z"), 1)(file, lambda: iter(chunks))
    assert [line.split(b",")[:2] for line in (tmp_path / "a.csv").read_bytes().splitlines()[1:]] == [
        [b"caf\xe9.png", b"y"],
        [b"b", b"x"],
        [b"long name", b"z"],
    ]
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["input"] == name
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet")["input"].to_pylist()[0] == "caf\ufffd.png"
    assert np.load(tmp_path / "a.npz")["inputs"].tolist() == [name, "b", "long name"]


def test_parquet_rows_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpdsgr_deploy.prediction.writers.ROW_GROUP", 5)
    chunks = [Chunk([f"{i}a", f"{i}b"], np.eye(2, dtype=np.float32)) for i in range(4)]
    file = io.BytesIO()
    find_writer(".parquet", ("x", "y"), 2)(file, lambda: iter(chunks))
    found = pyarrow.parquet.ParquetFile(file)
    assert [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)] == [6, 2]
    assert found.read()["input"].to_pylist() == [f"{i}{letter}" for i in range(4) for letter in "ab"]


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_a_full_disk_is_no_success_in_any_format(suffix: str) -> None:
    chunks = [Chunk(["a"] * 10_000, np.zeros((10_000, 2), np.float32))]
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        find_writer(suffix, ("x", "y"), 1)(file, lambda: iter(chunks))


def test_options_that_make_no_sense_are_refused(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    for out, top, expected in (
        ("o.csv", 11, "only 10 classes"),
        ("o.npz", 2, "no effect on .npz"),
        ("o.pickle", 1, r"\.parquet"),
        (".", 1, "is a directory"),
    ):
        with pytest.raises(InputError, match=expected):
            job(bundle, folder, top=top).to_file(tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_arrays_images_and_folders_keep_their_order(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    pixels = load_test(bundle.manifest.recipe.data)[:7].pixels
    np.save(tmp_path / "a.npy", pixels)
    np.savez_compressed(tmp_path / "b.npz", other=np.zeros(3), images=pixels.astype(np.float32) / np.float32(255))
    paths = [folder / "03.png", folder / "01.png", tmp_path / "a.npy", tmp_path / "b.npz", folder]
    with Inputs(paths, (1, 8, 8)) as inputs:
        batches = inputs.batches(BATCH)
        assert [len(batch) for batch in batches[:5]] == [2, 4, 3, 4, 3]
        assert len(inputs) == sum(map(len, batches)) == 2 + 7 + 7 + N
    job(bundle, *paths).to_file(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as arrays:
        names, found = arrays["inputs"].tolist(), arrays["logits"]
    assert names[:3] == [str(folder / "03.png"), str(folder / "01.png"), f"{tmp_path / 'a.npy'}[0]"]
    assert names[15:17] == [f"{tmp_path / 'b.npz'}[6]", str(folder / "00.png")]
    np.testing.assert_allclose(found[2:9], found[9:16], atol=1e-5)
    np.testing.assert_allclose(found[2:9], found[16:23], atol=1e-5)
    np.testing.assert_allclose(found[[1, 0]], found[[17, 19]], atol=1e-5)


def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    shape = (2, 3, 4)
    good = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
    np.savez_compressed(tmp_path / "good.npz", good)
    np.savez(tmp_path / "empty.npz")
    for name, array, expected in (
        ("double.npy", good.astype(np.float64), "these are float64"),
        ("swapped.npy", good.astype(">f4"), "these are >f4"),
        ("objects.npy", np.full((1, *shape), None), "these are object"),
        ("scalar.npy", np.float32(0), r"shape \[N >= 1, 2, 3, 4\], these have \[\]"),
        ("none.npy", good[:0], r"have \[0, 2, 3, 4\]"),
        ("other.npy", good[:, :1], r"have \[5, 1, 3, 4\]"),
        ("fortran.npy", np.asfortranarray(good), "np.ascontiguousarray"),
    ):
        np.save(tmp_path / name, array)
        with pytest.raises(InputError, match=expected) as error:
            Inputs([tmp_path / name], shape)
        assert name in str(error.value)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-60])
    (tmp_path / "text.npy").write_text("hello")
    for name in ("empty.npz", "cut.npz", "text.npy"):
        with pytest.raises(InputError, match=f"cannot read array .*{name}"):
            Inputs([tmp_path / name], shape)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    np.save(tmp_path / "cut.npy", good)
    os.truncate(tmp_path / "cut.npy", size(tmp_path / "cut.npy") - 1)
    for name in ("flipped.npz", "cut.npy"):
        with pytest.raises(InputError, match=f"cannot read array .*{name}"), Inputs([tmp_path / name], shape) as found:
            [batch.read(None) for batch in found.batches(2)]


def test_pixels_out_of_range_are_named(bundle: Bundle, tmp_path: Path) -> None:
    x = np.zeros((9, 1, 8, 8), np.float32)
    x[5] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=r"x.npy\[4\] to \[7\]: pixels must be finite"):
        job(bundle, tmp_path / "x.npy").to_file(tmp_path / "out.csv")


@pytest.mark.parametrize("name", ["large.npy", "large.npz"])
def test_memory_does_not_grow_with_the_input(
    name: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MB of zeros through a network of 3x64x64 images; a batch is 0.4 MB of pixels, 1.6 MB as float32."""
    shape, count = (3, 64, 64), 5461
    large = Bundle(bundle.path, bundle.manifest.model_copy(update={"input_shape": shape}))
    array = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (count, *shape))
    if name == "large.npz":
        np.savez_compressed(tmp_path / name, array)
    del array
    answering(lambda x: np.zeros((len(x), 10), np.float32), monkeypatch)
    begun = ended = most = 0
    read = ArrayFile.read

    def counted(*arguments: object) -> np.ndarray:
        nonlocal begun, most
        begun += 1
        most = max(most, begun - ended)
        return read(*arguments)

    append = Partial.append

    def written(*arguments: object) -> None:
        nonlocal ended
        ended += 1
        append(*arguments)

    monkeypatch.setattr(ArrayFile, "read", counted)
    monkeypatch.setattr(Partial, "append", written)
    tracemalloc.start()
    try:
        assert job(large, tmp_path / name, batch=32).to_file(tmp_path / "out.npz") == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6
    assert 2 <= most <= 8
    assert begun == ended == -(-count // 32)


def test_a_killed_run_goes_on_and_writes_every_row_once_in_any_format(
    slow: Callable[..., "subprocess.Popen[str]"], bundle: Bundle, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Killed at moments that the partial file's size and a die choose; the result is that of an uninterrupted run."""
    caplog.set_level("INFO")
    out, place = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    draw = random.Random(0)
    for share in (0, 0.2, 0.6):
        process = slow(bundle.path, folder, "--batch", BATCH, "--out", out)
        until(lambda share=share: size(place) > share * N * (40 + 32 / BATCH))
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.wait()
        assert not out.exists()
    left = place.read_bytes()
    monkeypatch.setitem(BACKENDS, "slow", BACKENDS["onnxruntime-cpu"])
    for suffix in FORMATS:
        out = tmp_path / f"out{suffix}"
        place = out.with_name(f"{out.name}.partial")
        place.write_bytes(left)
        caplog.clear()
        assert Job(bundle, (folder,), "slow", "fp32", BATCH).to_file(out) == N
        finished = int(caplog.text.split("going on after the ")[1].split()[0])
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
    fails(job(bundle, photos), "going on after the 8 images")
    fails(job(bundle, photos, batch=3), "starting anew")
    fails(job(bundle, photos, batch=3), "going on after the 9 images")
    later = 10**18
    os.utime(photos / "07.png", ns=(later, later))  # changed after it was classified
    fails(job(bundle, photos, batch=3), "going on after the 6 images")
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"digest": "another"}))
    fails(job(other, photos, batch=3), "starting anew")
    os.utime(photos / "00.png", ns=(later, later))
    fails(job(other, photos, batch=3), "starting anew")
    broken.unlink()  # what comes after the finished images may change
    caplog.clear()
    assert job(other, photos, batch=3).to_file(out) == 11
    assert "going on after the 9 images" in caplog.text
    assert [Path(row["input"]).name for row in csv.DictReader(out.read_text().splitlines())] == [
        f"{i:02}.png" for i in range(12) if i != 9
    ]


def test_a_partial_file_is_ours_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.partial").write_text("my thesis")
    with pytest.raises(InputError, match="not a partial output of ours"):
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
    assert "going on after the " in stderr
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


def test_a_batch_too_large_for_memory_is_halved_and_said_once(
    bundle: Bundle, folder: Path, logits: np.ndarray, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    sizes = []
    with open_predictor(bundle) as predictor:

        def small(x: np.ndarray) -> np.ndarray:
            sizes.append(len(x))
            if len(x) > 5:
                raise OutOfMemory("too much")
            return predictor(x)

        answering(small, monkeypatch)
        job(bundle, folder, batch=32).to_file(tmp_path / "out.npz")
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], logits, atol=1e-5)
    assert sizes == [32, 16, 8, *[4] * 15]
    assert [r.message for r in caplog.records if "memory" in r.message] == ["out of memory: going on with batches of 4"]


def write_network(path: Path, nodes: list[onnx.NodeProto], **inputs: tuple[object, ...]) -> Path:
    """An ONNX file of float32 `inputs` and the output y."""
    make = onnx.helper
    values = {**inputs, "y": ("b", 1, 1, 1)}
    *given, y = (make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values.items())
    graph = make.make_graph(nodes, "network", given, [y])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10), path)
    return path


def reshaped(path: Path, *shape: int) -> Path:
    """Every image filled up to a shape, by Expand; then its maximum."""
    make = onnx.helper
    constant = make.make_node("Constant", [], ["s"], value_ints=shape)
    nodes = [constant, make.make_node("Expand", ["x", "s"], ["e"]), make.make_node("ReduceMax", ["e"], ["y"])]
    return write_network(path, nodes, x=("b", 1, 1, 1))


def test_a_single_image_too_large_for_memory_is_one_line(tmp_path: Path) -> None:
    """A real session that asks for 4 PB an image, in the place of the network."""
    with OnnxRuntime(reshaped(tmp_path / "greedy.onnx", 1, 1, 1, 10**15)) as session:
        with pytest.raises(OutOfMemory, match="batch of 3"):
            session(np.zeros((3, 1, 1, 1), np.float32))
        with pytest.raises(OutOfMemory, match="single image") as error:
            workers.Halving(session, 8)(np.zeros((8, 1, 1, 1), np.uint8))
    assert "\n" not in str(error.value)


def test_noise_too_large_for_memory_is_one_line(tmp_path: Path) -> None:
    """numpy's own MemoryError, of 4 PB of noise an image."""
    nodes = [onnx.helper.make_node("ReduceMax", ["noise"], ["m"]), onnx.helper.make_node("Add", ["x", "m"], ["y"])]
    path = write_network(tmp_path / "noisy.onnx", nodes, x=("b", 1, 1, 1), noise=("b", 10**15))
    noise = NoiseSource([NoiseInput(name="noise", kind="uniform", shape=(10**15,))])
    for backend in (OnnxRuntime, OpenVino):
        with backend(path, noise=noise) as session, pytest.raises(OutOfMemory, match="single image"):
            workers.Halving(session, 8)(np.zeros((8, 1, 1, 1), np.uint8))


@pytest.mark.parametrize("backend", [OnnxRuntime, OpenVino])
def test_what_fails_while_it_runs_is_one_line(backend: Callable[[Path], Predictor], tmp_path: Path) -> None:
    """Four images do not fill up to two."""
    path, x = reshaped(tmp_path / "two.onnx", 2, 1, 1, 1), np.zeros((4, 1, 1, 1), np.float32)
    with backend(path) as session, pytest.raises(InputError, match=r"(fails on a|in) batch(es)? of 4") as error:
        session(x)
    assert not isinstance(error.value, OutOfMemory)
    assert "\n" not in str(error.value)


def test_torch_says_that_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(torch.nn.Module):
        stochastic = False

        def forward(self, x: torch.Tensor, observe: object, noise: object) -> torch.Tensor:
            return torch.empty(10**15)

    model = TorchModel(Greedy(), (1, 1, 1))
    x = np.zeros((3, 1, 1, 1), np.float32)
    with pytest.raises(OutOfMemory, match="batch of 3"):
        model(x)

    def on_the_gpu(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Greedy, "forward", on_the_gpu)
    with pytest.raises(OutOfMemory, match="batch of 3"):
        model(x)
    monkeypatch.setattr(Greedy, "to", on_the_gpu)
    with pytest.raises(OutOfMemory, match="the network"):
        TorchModel(Greedy(), (1, 1, 1))


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
    assert_input_error(done, "cannot write", what, "free some space", "kept" if room < 1 else "untouched")
    assert out.read_bytes() == b"older"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["out.npz", "out.npz.partial"]
    done = mpdsgr(*arguments)
    assert done.returncode == 0
    assert "going on after the " in done.stderr
    job(bundle, folder).to_file(tmp_path / "whole.npz")
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_reader_that_has_enough_is_no_error(bundle: Bundle, folder: Path) -> None:
    """Rows enough to fill the pipe and its buffers."""
    command = f"{sys.executable} -m mpdsgr_deploy predict {bundle.path} {f'{folder} ' * 50} | head -n 2"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "input,label,probability"


def test_a_full_disk_behind_stdout_is_one_line(bundle: Bundle, folder: Path) -> None:
    command = [sys.executable, "-m", "mpdsgr_deploy", "predict", bundle.path, folder]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert_input_error(done, "No space left on device")


def test_a_log_and_a_terminal_tell_count_and_speed(bundle: Bundle, folder: Path) -> None:
    done = mpdsgr("predict", bundle.path, folder)
    assert f"predicting: {N} of {N} images, " in done.stderr
    assert "images/s" in done.stderr
    assert len(done.stdout.splitlines()) == N + 1
    terminal, stderr = os.openpty()
    command = [sys.executable, "-m", "mpdsgr_deploy", "predict", bundle.path, folder, "--batch", "1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    shown = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr, check=False, env=environment)
    bar = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    os.close(stderr)
    assert shown.returncode == 0
    assert f"/{N}" in bar
    assert "images/s" in bar


def test_an_interrupt_is_one_line_and_keeps_what_is_finished(
    slow: Callable[..., "subprocess.Popen[str]"], bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    """As Ctrl-C does, the signal reaches every process of the group."""
    place = tmp_path / "out.csv.partial"
    process = slow(bundle.path, *[folder] * 10, "--batch", 1, "--processes", 2, "--out", tmp_path / "out.csv")
    until(lambda: size(place) > 5 * 72 and len(children(process)) == 2)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted; what was finished is on disk\n")
    assert size(place) > 5 * 72
