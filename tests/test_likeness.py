"""Transparent images and images unlike the training images."""

from pathlib import Path

import numpy as np
import pytest
from conftest import mpdsgr_here
from PIL import Image

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test, load_training
from mpdsgr_deploy.data.image_files import read_image
from mpdsgr_deploy.data.likeness import Likeness, PixelStatistics
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.validation.target import Target
from mpdsgr_deploy.validation.validate import warn_if_unlike


def test_two_pictures_that_look_alike_are_read_alike(tmp_path: Path) -> None:
    """Black behind full transparency, and white: every viewer shows white for both."""
    for mode, hidden, name in [
        ("RGBA", (0, 0, 0, 0), "black"),
        ("RGBA", (255, 255, 255, 0), "white"),
        ("LA", (0, 0), "la"),
    ]:
        image = Image.new(mode, (8, 8), hidden)
        image.paste((200, 10, 10, 255) if mode == "RGBA" else (60, 255), (2, 2, 5, 5))
        image.save(tmp_path / f"{name}.png")
    flat = Image.new("RGB", (8, 8), "white")
    flat.paste((200, 10, 10), (2, 2, 5, 5))
    flat.save(tmp_path / "flat.png")
    for shape in ((3, 8, 8), (1, 8, 8)):
        expected = read_image(tmp_path / "flat.png", shape)
        assert np.array_equal(read_image(tmp_path / "black.png", shape), expected)
        assert np.array_equal(read_image(tmp_path / "white.png", shape), expected)
    assert read_image(tmp_path / "la.png", (1, 8, 8))[0, 0, 0] == 255


def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "p.png", transparency=0)
    pixels = read_image(tmp_path / "p.png", (3, 4, 4))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 1, 1].tolist() == [10, 20, 30]


@pytest.fixture(scope="module")
def digits() -> tuple[PixelStatistics, np.ndarray]:
    mean, std = load_training(Data(name="digits"))[0].statistics()
    return PixelStatistics(mean=tuple(mean), std=tuple(std)), load_test(Data(name="digits")).pixels


@pytest.mark.parametrize("count", [1, 8, 100, 497])
def test_test_images_are_like_training_images(digits: tuple[PixelStatistics, np.ndarray], count: int) -> None:
    trained, pixels = digits
    assert Likeness(trained).add(pixels[:count]).warning() is None
    assert Likeness(trained).add(pixels[:count].astype(np.float32) / np.float32(255)).warning() is None


def test_inverted_digits_and_wrong_scales_are_unlike(digits: tuple[PixelStatistics, np.ndarray]) -> None:
    trained, pixels = digits
    assert "they look inverted" in (Likeness(trained).add(255 - pixels[:40]).warning() or "")
    assert "check their scale" in (Likeness(trained).add(pixels[:40] // 255).warning() or "")
    two_batches = Likeness(trained).add(255 - pixels[:20]).add(255 - pixels[20:40])
    assert two_batches.warning() == Likeness(trained).add(255 - pixels[:40]).warning()
    assert Likeness(trained).warning() is None


def test_predict_warns(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = load_test(Data(name="digits")).pixels[:40]
    np.save(tmp_path / "usual.npy", pixels)
    np.save(tmp_path / "inverted.npy", 255 - pixels)
    done = mpdsgr_here("predict", bundle.path, tmp_path / "usual.npy", "--out", tmp_path / "a.csv")
    assert done.returncode == 0
    assert "unlike the training images" not in caplog.text
    done = mpdsgr_here("predict", bundle.path, tmp_path / "inverted.npy", "--out", tmp_path / "b.csv")
    assert "unlike the training images: their pixels have mean 0.70" in caplog.text


def test_validate_warns_of_images_unlike_the_training_images(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    images = load_test(Data(name="digits"))[:40]
    warn_if_unlike(Target(bundle), images)
    assert not caplog.records
    images.pixels = 255 - images.pixels
    warn_if_unlike(Target(bundle), images)
    assert "they look inverted" in caplog.text
