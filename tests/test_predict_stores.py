"""mpdsgr predict reads Parquet shards, and all that it reads here in an object store too."""

import csv
import io
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from conftest import assert_input_error, mpdsgr_here
from object_store import BUCKET, ObjectStore, object_store
from PIL import Image

import mpdsgr_deploy as mpd
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError, StoreError
from mpdsgr_deploy.prediction.inputs import Inputs, travelling
from mpdsgr_deploy.prediction.parquet import ParquetImages
from mpdsgr_deploy.prediction.stream import Job
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.stores import place_of

N, BATCH, SHAPE = 23, 4, (1, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, kind)
    return file.getvalue()


FILES = [encoded(image) for image in PIXELS]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A small one that comes with the package."""
    return open_bundle(shipped("export") / "doctor" / "bundle")


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


def write_shards(folder: Path) -> None:
    """The images as files, as arrays and as Parquet files of both kinds, each a folder's worth."""
    (folder / "photos" / "more").mkdir(parents=True)
    for i, content in enumerate(FILES):
        (folder / "photos" / ("more" if i % 2 else ".") / f"photo[{i:02}].png").write_bytes(content)
    (folder / "photos" / "notes.txt").write_text("no image")
    (folder / "photos" / ".hidden.png").write_bytes(FILES[0])
    for kind in ("arrays", "shards"):
        (folder / kind).mkdir()
    np.save(folder / "arrays" / "a.npy", PIXELS[:9])
    np.savez_compressed(folder / "arrays" / "b.npz", images=PIXELS[9:])
    plain = {"label": [0] * 9, "img": FILES[:9], "mask": FILES[:9]}
    parquet.write_table(arrow.table(plain), folder / "shards" / "0.parquet", row_group_size=5)
    hub = [{"bytes": content, "path": "the/same/name.png"} for content in FILES[9:]]
    parquet.write_table(arrow.table({"picture": hub, "label": [0] * 14}), folder / "shards" / "1.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def uploaded(store: ObjectStore, folder: Path) -> ObjectStore:
    """The store with the folder's files."""
    store.put({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()})
    return store


def address(key: object) -> str:
    return f"s3://{BUCKET}/{key}"


def table(bundle: Bundle, out: Path, *inputs: object, **options: Any) -> Any:
    """Names and logits of a job's rows, the latter as bytes."""
    job = Job(bundle, [place_of(str(place)) for place in inputs], "onnxruntime-cpu", "fp32", BATCH, **options)
    job.to_file(out)
    with np.load(out) as arrays:
        return arrays["inputs"].tolist(), [row.tobytes() for row in arrays["logits"]]


def test_shards_hold_the_images_of_files(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.npz"
    _, logits = table(bundle, out, folder / "arrays")
    names, same = table(bundle, out, folder / "shards")
    assert same == logits
    assert names[8:11] == [f"{folder}/shards/0.parquet[8]", *(f"{folder}/shards/1.parquet[{i}]" for i in (0, 1))]
    names, of_files = table(bundle, out, folder / "photos")
    assert [names.index(f"{folder}/photos/{'more/' * (i % 2)}photo[{i:02}].png") for i in range(N)] == [
        of_files.index(row) for row in logits
    ]


def test_stretches_are_read_in_any_order_and_apart(folder: Path) -> None:
    with (
        Inputs([folder / "shards" / "0.parquet"], SHAPE) as inputs,
        Inputs([folder / "arrays" / "b.npz"], SHAPE) as arrays,
        ThreadPoolExecutor(2) as pool,
    ):
        (batch,) = inputs.batches(9)
        for start, stop in [(0, 2), (2, 7), (4, 6), (5, 6), (8, 9), (0, 1), (6, 9), (3, 3)][:-1]:
            assert np.array_equal(batch.source.read(start, stop, pool), PIXELS[start:stop])
        for other in (batch, arrays.batches(9)[0]):  # one that a second thread reads again for its faults
            assert other.alone().source is not other.source


def test_a_row_group_larger_than_memory_is_read_in_pages(tmp_path: Path) -> None:
    file = tmp_path / "one-group.parquet"
    noise = np.random.default_rng(0).integers(0, 256, (48, 1, 512, 512), np.uint8)
    rows = [encoded(image, "bmp") for image in noise]
    parquet.write_table(arrow.table({"image": rows}), file, write_batch_size=4, compression="none")
    assert parquet.read_metadata(file).num_row_groups == 1
    pool = arrow.default_memory_pool()
    before, largest = pool.bytes_allocated(), 0
    source = ParquetImages(file, SHAPE)
    with ThreadPoolExecutor(1) as threads:
        for start in range(0, len(rows), BATCH):
            source.read(start, start + BATCH, threads)
            largest = max(largest, pool.bytes_allocated() - before)
    assert largest < file.stat().st_size / 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"input": ["a"], "label": [1]}, r"no column of encoded images; .*columns: input, label"),
        (
            {"left": [b"x"], "right": [b"x"]},
            r"2 columns of bytes, left, right; name the column of images, .*image or img",
        ),
        ({"image": [b"x"], "right": [b"x"]}, r"cannot decode image .*\[0\]"),
        ({"image": [{"bytes": None, "path": "a.png"}]}, r"\[0\] holds no bytes"),
        ({"image": arrow.array([], arrow.binary())}, "has no rows"),
    ],
)
def test_parquet_files_that_cannot_be_used(columns: dict[str, Any], expected: str, tmp_path: Path) -> None:
    if "image" in columns and isinstance(columns["image"], list) and isinstance(columns["image"][0], dict):
        kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
        columns = {"image": arrow.array(columns["image"], kind)}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=expected), Inputs([tmp_path / "a.parquet"], SHAPE) as inputs:
        inputs.batches(1)[0].read(ThreadPoolExecutor(1))


def test_a_damaged_parquet_file_and_one_for_event_frames(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes((folder / "shards" / "0.parquet").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cannot read Parquet file .*cut\.parquet"):
        Inputs([tmp_path / "cut.parquet"], SHAPE)
    with pytest.raises(InputError, match="the network takes event frames"):
        Inputs([folder / "shards" / "0.parquet"], (8, 34, 34))


def test_rows_from_a_store_are_those_from_here(
    bundle: Bundle, folder: Path, uploaded: ObjectStore, tmp_path: Path
) -> None:
    for kind in ("photos", "arrays", "shards"):
        names, logits = table(bundle, tmp_path / "here.npz", folder / kind)
        stored = table(bundle, tmp_path / "there.npz", address(kind))
        assert stored == ([name.replace(str(folder), f"s3://{BUCKET}") for name in names], logits)
    (tmp_path / "list.txt").write_text("\n".join([address("photos/photo[00].png"), f"{folder}/arrays/a.npy"]))
    uploaded.put({"list.txt": (tmp_path / "list.txt").read_bytes()})
    done = mpdsgr_here("predict", bundle.path, "--list", address("list.txt"), "--out", tmp_path / "o.csv")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 1 + 1 + 9
    logits = mpd.predict(bundle, address("arrays/a.npy"))
    assert logits.shape == (9, 10)


def test_folders_are_listed_and_arrays_fetched_by_ranges(bundle: Bundle, uploaded: ObjectStore) -> None:
    uploaded.fetched()
    with Inputs([place_of(address("photos"))], SHAPE) as inputs, ThreadPoolExecutor(2) as pool:
        assert len(inputs) == N
        batch = inputs.batches(BATCH)[1]
        batch.stamp()
        assert uploaded.fetched() == []
        batch.read(pool)
        assert len(uploaded.fetched(".png")) == BATCH
    large = np.zeros((60_000, *SHAPE), np.uint8)
    file = io.BytesIO()
    np.save(file, large)
    uploaded.put({"large.npy": file.getvalue()})
    with Inputs([place_of(address("large.npy"))], SHAPE) as inputs, ThreadPoolExecutor(2) as pool:
        inputs.batches(100)[300].alone().read(pool)
        ranges = [one.range for one in uploaded.fetched("large.npy") if one.range]
    fetched = [1 + int(b) - int(a) for a, b in (text.removeprefix("bytes=").split("-") for text in ranges)]
    assert 0 < sum(fetched) < large.nbytes
    assert len(fetched) == 2


def test_batches_that_travel_together_open_each_file_once(uploaded: ObjectStore) -> None:
    """As one batch of all its images does, and not once for each batch."""
    places = [place_of(address(name)) for name in ("shards/0.parquet", "arrays/b.npz", "shards/1.parquet")]

    def requests(size: int) -> int:
        with Inputs(places, SHAPE) as inputs, ThreadPoolExecutor(2) as pool:
            batches = pickle.loads(pickle.dumps(travelling(inputs.batches(size))))
            uploaded.fetched()
            images = np.concatenate([batch.read(pool) for batch in batches])
        assert np.array_equal(images, np.concatenate([PIXELS[:9], PIXELS[9:], PIXELS[9:]]))
        return len(uploaded.fetched())

    assert requests(2) == requests(N)


def test_a_share_of_a_store_with_bad_files(bundle: Bundle, uploaded: ObjectStore, tmp_path: Path) -> None:
    uploaded.put({"mixed/a.png": FILES[0], "mixed/b.png": b"no image", "mixed/c.png": b"", "mixed/d.png": FILES[1]})
    inputs = [address("mixed"), address("gone.png"), address("photos")]
    rows: list[dict[str, str]] = []
    for share in (1, 2):
        out = tmp_path / f"{share}.csv"
        options = ["--shard", f"{share}/2", "--on-error", "skip", "--batch", BATCH, "--out", out]
        done = mpdsgr_here("predict", bundle.path, *inputs, *options)
        assert done.returncode == 0, done.stderr
        rows += csv.DictReader(out.read_text().splitlines())
    assert len(rows) == 2 + N
    skipped = (tmp_path / "1.csv.skipped.csv").read_text()
    assert "gone.png,s3://bucket/gone.png does not exist" in skipped
    assert skipped.count("cannot decode image s3://bucket/mixed/") == 2
    done = mpdsgr_here("predict", bundle.path, *inputs[:1], "--out", tmp_path / "stop.csv")
    assert_input_error(done, "cannot decode image s3://bucket/mixed/b.png")


def test_a_changed_file_is_computed_again(bundle: Bundle, uploaded: ObjectStore, tmp_path: Path) -> None:
    uploaded.put({f"few/{i}.png": content for i, content in enumerate([*FILES[:8], b"no image"])})
    job = Job(bundle, [place_of(address("few"))], "onnxruntime-cpu", "fp32", BATCH)
    for content in (b"still none", FILES[9]):
        with pytest.raises(InputError, match=r"few/8\.png"):
            job.to_file(tmp_path / "o.npz")
        uploaded.put({"few/8.png": content, "few/5.png": FILES[8]})
    job.to_file(tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as arrays:
        assert np.array_equal(arrays["logits"], mpd.predict(bundle, PIXELS[[0, 1, 2, 3, 4, 8, 6, 7, 9]], batch=BATCH))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (address("no-key.png"), "s3://bucket/no-key.png does not exist"),
        (address("no-folder/"), "s3://bucket/no-folder/ does not exist"),
        ("s3://no-bucket/a.png", "does not exist: The specified bucket does not exist"),
        (address("empty.parquet"), "cannot read Parquet file s3://bucket/empty.parquet"),
        ("gs://bucket/a.png", r"gcsfs.*pip install 'mpdsgr-deploy\[gs\]'"),
        ("nowhere://bucket/a.png", "Protocol not known: nowhere"),
    ],
)
def test_what_cannot_be_read_is_one_line(place: str, expected: str, uploaded: ObjectStore) -> None:
    uploaded.put({"empty.parquet": b""})
    with pytest.raises(InputError, match=expected) as error:
        Inputs([place_of(place)], SHAPE)
    assert "\n" not in str(error.value)


def test_a_store_that_cannot_be_asked_ends_a_run_that_skips(
    bundle: Bundle, uploaded: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run whose credentials expire would skip all the images that are left."""
    command = ["predict", bundle.path, address("photos"), "--on-error", "skip"]
    assert_input_error(mpdsgr_here(*command, "--out", address("o.csv")), "to which only --ray writes")
    with Inputs([place_of(address("photos"))], SHAPE, skip=True) as inputs, ThreadPoolExecutor(2) as pool:
        uploaded.refuse = 403
        with pytest.raises(StoreError, match=r"access denied .*check the credentials"):
            inputs.batches(BATCH)[0].read_usable(pool)
        uploaded.refuse = None
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    uploaded.fs.clear_instance_cache()
    assert_input_error(mpdsgr_here(*command), "Unable to locate credentials; every machine")
    uploaded.fs.clear_instance_cache()
