from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpdsgr_deploy.data import load_test, load_training
from mpdsgr_deploy.data.batches import augment, generator, shuffled_batches, to_unit
from mpdsgr_deploy.data.files import read_array, read_image, read_inputs
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Data


def keys(pixels: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in pixels}


def test_digits_are_real_and_split_three_ways() -> None:
    config = Data(name="digits")
    training, validation = load_training(config)
    test = load_test(config)
    assert (len(training), len(validation), len(test)) == (1170, 130, 497)
    assert training.shape == (1, 8, 8)
    assert len(keys(np.concatenate([training.pixels, validation.pixels, test.pixels]))) == 1797
    assert test.unit().max() == 1.0
    mean, std = training.statistics()
    assert mean[0] == pytest.approx(training.unit().mean(), abs=1e-4)
    assert std[0] == pytest.approx(training.unit().std(), abs=1e-4)


def test_the_split_ignores_the_training_seed_and_subsets_nest() -> None:
    few, held = load_training(Data(name="digits", train_images=100))
    more, held_again = load_training(Data(name="digits", train_images=200))
    assert np.array_equal(more.pixels[:100], few.pixels)
    assert np.array_equal(held.pixels, held_again.pixels)
    with pytest.raises(InputError, match="leaves 1170 training images"):
        load_training(Data(name="digits", train_images=2000))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_a_missing_data_set_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"download=True") as error:
        load_test(Data(name=name, root=str(tmp_path)))
    assert "--root" in str(error.value)


def test_unknown_data_set_names_the_known() -> None:
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        load_test(Data(name="cifar-10"))


def test_mnist_files_are_read(tmp_path: Path) -> None:
    """Real IDX files, written here, through torchvision's own reader."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for prefix in ("train", "t10k"):
        images = bytes([0, 0, 8, 3]) + np.array([5, 28, 28], ">i4").tobytes() + pixels.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = bytes([0, 0, 8, 1]) + np.array([5], ">i4").tobytes() + bytes([3, 1, 4, 1, 5])
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    found = load_test(Data(name="mnist", root=str(tmp_path)))
    assert np.array_equal(found.pixels[:, 0], pixels)
    assert found.classes.tolist() == [3, 1, 4, 1, 5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for k, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
            place = tmp_path / split / f"class{k}"
            place.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (12 + i, 9), colour).save(place / f"{i}.png")
    return tmp_path


def test_a_constant_channel_does_not_divide_by_zero(folder: Path) -> None:
    _, std = load_test(Data(name="imagefolder", root=str(folder), image_size=8)).statistics()
    assert std[2] == 1 / 255


def test_imagefolder(folder: Path) -> None:
    config = Data(name="imagefolder", root=str(folder), image_size=8)
    test = load_test(config)
    assert test.labels == ("class0", "class1")
    assert test.shape == (3, 8, 8)
    assert [tuple(p) for p in test.pixels[:, :, 4, 4][[0, -1]]] == [(255, 0, 0), (0, 255, 0)]
    training, validation = load_training(config)
    assert (len(training), len(validation)) == (18, 2)
    with pytest.raises(InputError, match=r"data\.image_size"):
        load_test(Data(name="imagefolder", root=str(folder)))
    with pytest.raises(InputError, match="one folder a class"):
        load_test(Data(name="imagefolder", root=str(folder / "train"), image_size=8))
    (folder / "test" / "class0" / "0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"cannot decode image .*0\.png"):
        load_test(config)


def test_augmentation_crops_within_the_padding_and_flips() -> None:
    """Every output is one of the shifts and flips that may come out, and all kinds do come out."""
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    padded = torch.nn.functional.pad(image, [1] * 4)[0]
    allowed = {}
    for top in range(3):
        for left in range(3):
            crop = padded[:, top : top + 4, left : left + 4]
            allowed[crop.numpy().tobytes()] = (top, left, False)
            allowed[crop.flip(-1).contiguous().numpy().tobytes()] = (top, left, True)
    batch = image.expand(400, -1, -1, -1)
    out = augment(batch, padding=1, flip=True, draw=generator(0, "test"))
    seen = {allowed[o.contiguous().numpy().tobytes()] for o in out}
    assert len(seen) == 18
    unflipped = augment(batch, padding=1, flip=False, draw=generator(0, "test"))
    assert not any(allowed[o.contiguous().numpy().tobytes()][2] for o in unflipped)
    assert torch.equal(out, augment(batch, padding=1, flip=True, draw=generator(0, "test")))


def test_batches_cover_the_epoch_once_and_depend_on_seed_and_epoch_alone() -> None:
    first = torch.cat(list(shuffled_batches(10, 3, generator(1, "shuffle", 0))))
    assert len(set(first.tolist())) == len(first) == 9
    assert torch.equal(first, torch.cat(list(shuffled_batches(10, 3, generator(1, "shuffle", 0)))))
    assert not torch.equal(first, torch.cat(list(shuffled_batches(10, 3, generator(1, "shuffle", 1)))))
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]


def test_arrays_and_images_as_inputs(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "b.npz", images=pixels.astype(np.float32) / np.float32(255))
    assert np.array_equal(read_array(tmp_path / "a.npy"), read_array(tmp_path / "b.npz"))
    np.save(tmp_path / "c.npy", pixels.astype(np.float64))
    with pytest.raises(InputError, match="these are float64"):
        read_array(tmp_path / "c.npy")
    (tmp_path / "d.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:50])
    with pytest.raises(InputError, match="cannot read array"):
        read_array(tmp_path / "d.npy")
    Image.fromarray(pixels[0, 0]).save(tmp_path / "e.png")
    assert np.array_equal(read_image(tmp_path / "e.png", (1, 8, 8)), pixels[0])
    assert read_image(tmp_path / "e.png", (3, 4, 6)).shape == (3, 4, 6)
    names = [n for found, _ in read_inputs([tmp_path / "e.png", tmp_path / "a.npy"], (1, 8, 8)) for n in found]
    assert names == [str(tmp_path / "e.png"), *(f"{tmp_path / 'a.npy'}[{i}]" for i in range(3))]
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:-60])
    for name, array in (("zero.npy", np.float32(0)), ("flat.npy", pixels[0]), ("none.npy", pixels[:0])):
        np.save(tmp_path / name, array)
    for name in ("empty.npz", "cut.npz", "zero.npy", "flat.npy", "none.npy"):
        with pytest.raises(InputError, match=name):
            read_array(tmp_path / name)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png", (1, 8, 8))
    with pytest.raises(InputError, match="does not exist"):
        list(read_inputs([tmp_path / "nothing"], (1, 8, 8)))
