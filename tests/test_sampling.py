"""The first N test images are a sample of all of them, also where a data set is listed class by class."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.data.images import MIXED, Images, in_sampling_order, is_class_by_class, name_sample, stratified_order
from mpdsgr_deploy.data.sets import BUILT_IN
from mpdsgr_deploy.recipe import Data


def images(classes: np.ndarray) -> Images:
    """Images whose pixel is their number."""
    pixels = np.arange(len(classes), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Images(pixels, np.asarray(classes, np.int64), ("a", "b", "c"))


def test_every_prefix_of_equal_classes_is_balanced() -> None:
    order = stratified_order(np.repeat(np.arange(3), 110))
    for n in (3, 41, 100, 101, 330):
        counts = np.bincount(np.repeat(np.arange(3), 110)[order[:n]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert sorted(order) == list(range(330))


def test_unequal_classes_come_once_each_and_then_in_proportion() -> None:
    classes = np.repeat(np.arange(3), [900, 90, 10])
    drawn = classes[stratified_order(classes)]
    assert set(drawn[:3]) == {0, 1, 2}
    counts = np.bincount(drawn[:100], minlength=3)
    assert np.abs(counts - [90, 9, 1]).max() <= 2


def test_mixed_order_is_left_alone_and_class_order_is_mixed_the_same_way_every_time() -> None:
    mixed = images(np.random.default_rng(0).integers(0, 3, 60))
    assert in_sampling_order(mixed) is mixed
    listed = images(np.repeat(np.arange(3), 20))
    first, second = in_sampling_order(listed), in_sampling_order(listed)
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(listed.classes[first.pixels.ravel()], first.classes)
    assert not np.array_equal(first.classes, listed.classes)


@pytest.mark.parametrize("classes", [[], [0], [0, 0, 0, 0], [0, 1], [1, 0, 1, 0]])
def test_few_images_or_one_class_keep_their_order(classes: list[int]) -> None:
    assert not is_class_by_class(np.array(classes, np.int64))


def test_digits_keep_the_order_everybody_knows() -> None:
    assert not is_class_by_class(load_test(Data(name="digits")).classes)


def test_an_image_folder_is_sampled(tmp_path: Path) -> None:
    for k, label in enumerate(("cat", "dog", "eel")):
        (tmp_path / "test" / label).mkdir(parents=True)
        for i in range(11):
            Image.new("RGB", (4, 4), (80 * k, i, 0)).save(tmp_path / "test" / label / f"{i:02}.png")
    found = load_test(Data(name="imagefolder", root=str(tmp_path), image_size=4))
    assert np.bincount(found.classes[:10], minlength=3).tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert np.array_equal(found.pixels[:, 0, 0, 0], 80 * found.classes)


def test_only_images_whose_order_everybody_knows_are_called_the_first() -> None:
    assert set(BUILT_IN) > MIXED
    assert name_sample(100, "digits") == "the first 100 test images of digits"
    assert name_sample(100, "imagefolder") == "100 test images of imagefolder, a fixed sample"
