"""Folders of images: what is read, what is passed over, and what is refused before any training."""

import shutil
from pathlib import Path

import pytest
from conftest import assert_input_error, mpdsgr_here, small_recipe
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test, load_training
from mpdsgr_deploy.data.image_files import image_suffixes, passed_over, walk
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.prediction.inputs import Inputs
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.training import train


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, colour, 9)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("test", 3)):
        for k, label in enumerate(("cat", "dog")):
            for i in range(count):
                picture(tmp_path / "data" / split / label / f"{i}.png", 100 * k + i)
    return tmp_path / "data"


def config(root: Path) -> Data:
    return Data(name="imagefolder", root=str(root), image_size=8)


def test_every_suffix_that_pillow_reads(tmp_path: Path) -> None:
    suffixes = (
        ".png",
        ".JPG",
        ".jpeg",
        ".bmp",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".jp2",
        ".ico",
        ".tga",
    )
    for i, suffix in enumerate(suffixes):
        picture(tmp_path / f"{i:02}{suffix}")
    with Inputs([tmp_path], (3, 8, 8)) as inputs:
        assert len(inputs) == len(suffixes)
    assert {suffix.lower() for suffix in suffixes} <= image_suffixes()
    assert not {".eps", ".pdf", ".mpg", ".h5", ".txt"} & image_suffixes()


def test_links_are_followed_hidden_entries_are_not_and_the_rest_is_counted(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    picture(inside / "a.png")
    picture(outside / "deep" / "b.png")
    (inside / "link").symlink_to(outside, target_is_directory=True)
    (outside / "deep" / "back").symlink_to(inside, target_is_directory=True)
    (inside / "self").symlink_to(inside / "self")
    (inside / "gone.png").symlink_to(inside / "nothing.png")
    picture(inside / ".hidden.png")
    picture(inside / ".git" / "c.png")
    (inside / "notes.txt").touch()
    (inside / "README").touch()
    found = walk(inside, image_suffixes())
    assert [path.relative_to(inside).as_posix() for path in found.files] == ["a.png", "link/deep/b.png"]
    assert found.passed_over == {"hidden": 2, ".txt": 1, "without a suffix": 1, "link in a circle": 1, "broken link": 2}
    assert passed_over(found.passed_over).startswith("2 broken link, 2 hidden, 1 .txt")


def test_what_was_passed_over_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "test" / "cat" / "labels.csv").touch()
    (root / "test" / ".ipynb_checkpoints").mkdir()
    assert load_test(config(root)).labels == ("cat", "dog")
    assert "6 images; ignored 1 .csv" in caplog.text


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_split(root: Path, name: str) -> None:
    (root / "test").rename(root / name)
    assert len(load_test(config(root))) == 6


def test_classes_must_agree_between_the_splits_before_training(root: Path) -> None:
    shutil.move(root / "test" / "dog", root / "test" / "fox")
    for load in (load_test, load_training):
        with pytest.raises(InputError, match="class 'fox' that train/ does not have"):
            load(config(root))
    shutil.rmtree(root / "test" / "fox")
    for load in (load_test, load_training):
        with pytest.raises(InputError, match=r"test/dog has no images"):
            load(config(root))
    shutil.copytree(root / "train" / "dog", root / "test" / "dog")
    for path in (root / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(InputError, match=r"train/dog has no images \(ignored: 6 \.txt\)"):
        load_training(config(root))


def test_missing_is_not_damaged(root: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingData):
        load_test(config(tmp_path / "nowhere"))
    shutil.rmtree(root / "test")
    with pytest.raises(InputError, match="has none of test, val") as error:
        load_test(config(root))
    assert not isinstance(error.value, MissingData)
    for name in ("cifar10", "mnist"):
        with pytest.raises(MissingData):
            load_test(Data(name=name, root=str(tmp_path)))
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match="damaged or incomplete") as error:
        load_test(Data(name="cifar10", root=str(tmp_path)))
    assert not isinstance(error.value, MissingData)


def test_export_refuses_damaged_or_asked_for_data(root: Path, tmp_path: Path) -> None:
    """A bundle without a reference is written only where nobody asked for the data and they are not there."""
    data = {"name": "imagefolder", "root": str(root), "image_size": 8, "validation_share": 0.25}
    recipe = small_recipe(data=data, training={"epochs": 1, "batch_size": 4}, encoding={"T": 1})
    train(recipe, tmp_path / "run")
    image = root / "test" / "cat" / "1.png"
    image.write_bytes(b"damaged")
    done = mpdsgr_here("export", tmp_path / "run", "--out", tmp_path / "bundle", "--root", root)
    assert_input_error(done, "cannot decode image", "1.png")
    done = mpdsgr_here("export", tmp_path / "run", "--out", tmp_path / "bundle", "--root", tmp_path / "nowhere")
    assert_input_error(done, "no images under")
    assert not (tmp_path / "bundle").exists()
    assert export(tmp_path / "run", tmp_path / "bundle").manifest.reference is None


def test_a_home_directory_is_written_out(
    root: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(load_test(config(Path("~/data")))) == 6
