"""mpdsgr predict: every format, inputs of any size, and files that are broken."""

import csv
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import assert_input_error, mpdsgr
from predicting import BATCH, N, answering, folder, job, logits, size

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction.arrays import ArrayFile
from mpdsgr_deploy.prediction.inputs import Inputs
from mpdsgr_deploy.prediction.partial import Chunk, Partial
from mpdsgr_deploy.prediction.writers import FORMATS, find_writer


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
        ("scalar.npy", np.float32(0), r"shape \[N >= 1, 2, 3, 4\], and these have \[\]"),
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
