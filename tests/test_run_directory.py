"""A training run's directory belongs to one process and one set of images."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_recipe
from PIL import Image

from mpdsgr_deploy.atomic_files import atomic_file
from mpdsgr_deploy.claimed_directories import claim_directory, scratch_directory
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.recipe import Data, Recipe
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.identity import data_identity, refuse_other_data

HOLD = "import sys; from pathlib import Path; from mpdsgr_deploy.locks import exclusive\n" + (
    "with exclusive(Path(sys.argv[1]), 'test'): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_training_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="is being written by another mpdsgr train"):
            train(small_recipe(), tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK]
        holder.kill()
    claim_directory(tmp_path, "recipe.json", "training run")  # the lock that a killed run leaves is no foreign file
    with exclusive(tmp_path / LOCK, "test"):
        pass
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_make_the_same_directory(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    with scratch_directory(out, "bundle") as scratch:
        (scratch / "begun").touch()
        with pytest.raises(InputError, match="process that makes bundle"), scratch_directory(out, "bundle"):
            pass
        assert (scratch / "begun").exists()
    assert not list(tmp_path.iterdir())


def test_an_error_of_reading_is_not_called_one_of_writing(tmp_path: Path) -> None:
    """What a block reads may lie beside what it writes, and may have a similar name."""
    for name in ("missing", "outer", "data/out"):
        for block in (scratch_directory(tmp_path / "out", "bundle"), atomic_file(tmp_path / "out")):
            with pytest.raises(InputError, match=rf"out was not written: .*{name}.*unchanged"), block:
                (tmp_path / name).read_bytes()
    with (
        pytest.raises(InputError, match=r"out was not written: cannot identify image file"),
        atomic_file(tmp_path / "out"),
    ):
        Image.open(io.BytesIO(b"no image"))
    with (
        pytest.raises(InputError, match=r"^cannot write .*out: No such"),
        scratch_directory(tmp_path / "out", "bundle") as scratch,
    ):
        (scratch / "none" / "file").write_text("")
    with pytest.raises(InputError, match=r"^cannot write .*out: No space"), atomic_file(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 8), ("test", 2)):
        for k, label in enumerate(("cat", "dog")):
            place = tmp_path / "data" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (120 * k, 20 * i, 7)).save(place / f"{i}.png")
    return tmp_path / "data"


def recipe(folder: Path, epochs: int) -> Recipe:
    data = {"name": "imagefolder", "root": str(folder), "image_size": 8, "validation_share": 0.25}
    return small_recipe(data=data, training={"epochs": epochs, "batch_size": 4}, encoding={"T": 1})


def test_resume_knows_the_data(folder: Path, tmp_path: Path) -> None:
    """A run that has seen one epoch is not continued on other images, and is on the same ones."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    train(recipe(folder, 1), run)
    shutil.copytree(folder, kept)

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            train(recipe(folder, 1), run, resume=True)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)

    for split in ("train", "test"):
        os.rename(folder / split / "cat", folder / split / "fox")
    refused("its classes are now without cat and with fox")
    for split in ("train", "test"):
        shutil.copytree(folder / split / "cat", folder / split / "eel")
    refused("its classes are now with eel")
    (folder / "train" / "cat" / "3.png").unlink()
    refused("training images before: 12, now: 11")
    Image.new("RGB", (8, 8), "white").save(folder / "train" / "cat" / "3.png")
    refused("images are different, or in another order")
    train(recipe(folder, 1), run, resume=True)


def test_a_run_without_a_record_of_its_data_is_resumed() -> None:
    refuse_other_data(None, data_identity(*load_training(Data(name="digits"))), Path("run"))
