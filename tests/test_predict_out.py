"""Where mpdsgr predict writes: never over an input, never into the bundle, through links and into pipes."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_input_error, mpdsgr_here

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.locks import LOCK
from mpdsgr_deploy.prediction.parts import JOB, part_name, parts_at
from mpdsgr_deploy.recipe import Data


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", load_test(Data(name="digits")).pixels[:5])
    return tmp_path / "in.npz"


@pytest.mark.parametrize("kind", ["same", "dots", "symlink", "hardlink", "partial"])
def test_an_input_is_not_overwritten(kind: str, bundle: Bundle, array: Path, tmp_path: Path) -> None:
    before = array.read_bytes()
    out = tmp_path / "out.npz"
    if kind == "same":
        out = array
    elif kind == "dots":
        out = tmp_path / ".." / tmp_path.name / "in.npz"
    elif kind == "symlink":
        out.symlink_to(array)
    elif kind == "hardlink":
        out.hardlink_to(array)
    else:
        array = array.rename(tmp_path / "in.csv.partial.npz")
        (tmp_path / "out.npz.partial").symlink_to(array)
    done = mpdsgr_here("predict", bundle.path, array, "--out", out)
    assert_input_error(done, "would overwrite the input")
    assert array.read_bytes() == before


def test_the_bundle_is_not_written_into(bundle: Bundle, array: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (tmp_path / "link").symlink_to(copy, target_is_directory=True)
    for out in (copy / "golden.npz", copy / "new.csv", tmp_path / "link" / "new.csv"):
        assert_input_error(mpdsgr_here("predict", copy, array, "--out", out), "is inside the bundle")
    open_bundle(copy)
    assert not (copy / "new.csv").exists()


def test_a_link_is_followed(bundle: Bundle, array: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out.csv").symlink_to(tmp_path / "there" / "real.csv")
    assert mpdsgr_here("predict", bundle.path, array, "--out", tmp_path / "out.csv").returncode == 0
    assert (tmp_path / "out.csv").is_symlink()
    assert len((tmp_path / "there" / "real.csv").read_text().splitlines()) == 6
    (tmp_path / "a.csv").symlink_to(tmp_path / "b.csv")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    assert mpdsgr_here("predict", bundle.path, array, "--out", tmp_path / "a.csv").returncode == 2


def test_a_pipe_is_written_to(bundle: Bundle, array: Path, tmp_path: Path) -> None:
    read: list[str] = []
    for name in ("pipe.csv", "pipe"):
        os.mkfifo(tmp_path / name)
        reader = threading.Thread(target=lambda name=name: read.append((tmp_path / name).read_text()))
        reader.start()
        assert mpdsgr_here("predict", bundle.path, array, "--out", tmp_path / name).returncode == 0
        reader.join(10)
    assert read[0] == read[1]
    assert len(read[0].splitlines()) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "pipe", "pipe.csv"]
    os.mkfifo(tmp_path / "pipe.npz")
    assert_input_error(mpdsgr_here("predict", bundle.path, array, "--out", tmp_path / "pipe.npz"), "several passes")


def test_parts_that_a_killed_machine_left_unfinished_are_removed(tmp_path: Path) -> None:
    folder = parts_at(tmp_path / "out")
    with folder.claimed():
        folder.describe({})
        killed = folder.part(0)
        killed.__enter__()  # a killed process never leaves this block
        with folder.part(0) as file:
            file.write(b"rows")
    assert folder.names() - {LOCK} == {JOB, part_name(0)}
