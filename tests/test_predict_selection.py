"""Lists, shares and skipped inputs of mpdsgr predict."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr_here
from PIL import Image
from predicting import BATCH, N, answering, folder, job, logits

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.prediction.inputs import read_list
from mpdsgr_deploy.prediction.stream import Job, Shard, parse_shard


def test_shares_in_order_are_the_whole_bit_for_bit(
    bundle: Bundle, folder: Path, logits: np.ndarray, tmp_path: Path
) -> None:
    parts = []
    for number in (1, 2, 3, 4):
        out = tmp_path / f"{number}.npz"
        done = mpdsgr_here("predict", bundle.path, folder, "--shard", f"{number}/4", "--batch", BATCH, "--out", out)
        assert done.returncode == 0, done.stderr
        with np.load(out) as arrays:
            parts.append((arrays["inputs"].tolist(), arrays["logits"]))
    assert [name for names, _ in parts for name in names] == [str(folder / f"{i:02}.png") for i in range(N)]
    assert np.array_equal(np.concatenate([part for _, part in parts]), logits)


@pytest.mark.parametrize("total", [1, 3, 7, 100])
def test_every_item_is_in_exactly_one_share(total: int) -> None:
    items = list(range(40))
    assert [i for k in range(1, total + 1) for i in Shard(k, total).of(items)] == items


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4 "])
def test_a_share_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="NUMBER/TOTAL"):
        parse_shard(text)


def test_a_list_of_inputs(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    names = [str(folder / f"{i:02}.png") for i in (5, 3, 9)]
    (tmp_path / "list.txt").write_text("\n".join([names[0], "", *names[1:]]) + "\n")
    done = mpdsgr_here("predict", bundle.path, "--list", tmp_path / "list.txt", "--out", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in csv.reader((tmp_path / "out.csv").read_text().splitlines())][1:] == names
    assert_input_error(mpdsgr_here("predict", bundle.path), "there is nothing to classify")
    (tmp_path / "empty").write_text("\n")
    for path in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(InputError, match="--list"):
            read_list(path)


def test_bad_inputs_are_skipped_and_named(bundle: Bundle, tmp_path: Path) -> None:
    """Damaged, missing, of a wrong shape and out of range: every good image is answered as without them."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    paths[2].write_bytes(b"no image")
    floats = (pixels[:, None] / np.float32(255)).astype(np.float32)
    floats[3] = np.nan
    np.save(tmp_path / "floats.npy", floats)
    np.save(tmp_path / "small.npy", pixels[:, :4])
    (tmp_path / "empty").mkdir()
    given = [*paths, tmp_path / "gone.png", tmp_path / "floats.npy", tmp_path / "small.npy", tmp_path / "empty"]
    out = tmp_path / "out.jsonl"
    done = mpdsgr_here("predict", bundle.path, *given, "--batch", 4, "--on-error", "skip", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "10 predictions in" in done.stdout
    rows = list(csv.reader((tmp_path / "out.jsonl.skipped.csv").read_text().splitlines()))
    assert rows[0] == ["input", "reason"]
    reasons = dict(rows[1:])
    assert {Path(name).name for name in reasons} == {"2.png", "gone.png", "floats.npy[3]", "small.npy", "empty"}
    assert "cannot decode" in reasons[str(paths[2])]
    good = [path for path in paths if path != paths[2]]
    answers = Job(bundle, good, "onnxruntime-cpu", "fp32", 4).logits()
    skipping = Job(bundle, paths, "onnxruntime-cpu", "fp32", 4, skip=True)
    skipping.to_file(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_allclose(arrays["logits"], answers, atol=1e-5)
        assert arrays["inputs"].tolist() == [str(path) for path in good]
    Image.fromarray(pixels[2]).save(paths[2])
    skipping.to_file(tmp_path / "a.npz")
    assert not (tmp_path / "a.npz.skipped.csv").exists()


def test_logits_that_are_not_finite_end_the_run_or_are_skipped(
    bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(x: np.ndarray) -> np.ndarray:
        found = np.zeros((len(x), 10), np.float32)
        found[0, 0] = np.inf
        return found

    answering(overflowing, monkeypatch)
    with pytest.raises(EvaluationError, match=r"00\.png are not finite"):
        job(bundle, folder).to_file(tmp_path / "o.jsonl")
    skipping = Job(bundle, [folder], "onnxruntime-cpu", "fp32", BATCH, skip=True)
    assert skipping.to_file(tmp_path / "o.jsonl") == N - N // BATCH
    assert "Infinity" not in (tmp_path / "o.jsonl").read_text()
    assert "logits are not finite" in (tmp_path / "o.jsonl.skipped.csv").read_text()
