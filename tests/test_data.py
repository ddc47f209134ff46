import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpdsgr_deploy.data import load_test, load_training, sets
from mpdsgr_deploy.data.batches import augment, generator, shuffled_batches, to_unit
from mpdsgr_deploy.data.image_files import read_image
from mpdsgr_deploy.data.images import Images
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


def test_digits_are_scikit_learns_with_and_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read = sets._digits_table()
    monkeypatch.setattr(sets, "find_spec", lambda name: None)  # as where its file lies elsewhere
    np.testing.assert_array_equal(read, sets._digits_table.__wrapped__())


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


def test_statistics_are_those_of_all_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2500, 2, 4, 4), np.uint8)
    pixels[:, 1] //= 3
    mean, std = Images(pixels, np.zeros(2500, np.int64), ("only",)).statistics()
    assert mean == pytest.approx(pixels.mean((0, 2, 3)) / 255, rel=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3)) / 255, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "place", "first", "last"),
    [("mnist", "MNIST", "0 - zero", "9 - nine"), ("fashion-mnist", "FashionMNIST", "T-shirt/top", "Ankle boot")],
)
def test_idx_files_are_read(name: str, place: str, first: str, last: str, tmp_path: Path) -> None:
    """Real IDX files, written here, through torchvision's own reader."""
    folder = tmp_path / place / "raw"
    folder.mkdir(parents=True)
    splits = {}
    for seed, (prefix, count) in enumerate([("train", 20), ("t10k", 5)]):
        draw = np.random.default_rng(seed)
        pixels, classes = draw.integers(0, 256, (count, 28, 28), np.uint8), draw.integers(0, 10, count, np.uint8)
        images = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">i4").tobytes() + pixels.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = bytes([0, 0, 8, 1]) + np.array([count], ">i4").tobytes() + classes.tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        splits[prefix] = pixels, classes
    config = Data(name=name, root=str(tmp_path))
    test = load_test(config)
    assert np.array_equal(test.pixels[:, 0], splits["t10k"][0])
    assert np.array_equal(test.classes, splits["t10k"][1])
    assert (len(test.labels), test.labels[0], test.labels[-1]) == (10, first, last)
    training, validation = load_training(config)
    assert (len(training), len(validation)) == (18, 2)
    assert keys(training.pixels) | keys(validation.pixels) == keys(splits["train"][0])
    cut = folder / "t10k-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged or incomplete in .*MNIST.*; point data\.root"):
        load_test(config)


def test_cifar100_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the format of the real ones; torchvision would compare them with the real ones' checksums."""
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class{k}" for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)
    for split in ("train", "test"):
        content = {"data": pixels.reshape(20, -1), "fine_labels": list(range(80, 100))}
        (folder / split).write_bytes(pickle.dumps(content))
    found = load_test(Data(name="cifar100", root=str(tmp_path)))
    assert np.array_equal(found.pixels, pixels)
    assert found.classes.tolist() == list(range(80, 100))
    assert found.labels == tuple(names)


WORDS = {"n03": "crane", "n01": "goldfish, Carassius auratus", "n02": "crane"}  # in an order that is not the sorted one


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """Three classes of ten training and two test images in the layout of the real data set; some images are grey."""
    root = tmp_path / "tiny-imagenet-200"
    draw = np.random.default_rng(0)

    def picture(path: Path, grey: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (64, 64) if grey else (64, 64, 3), np.uint8)).save(path)

    annotations = []
    for wnid in WORDS:
        for i in range(10):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", grey=i == 3)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    for i, wnid in enumerate(("n02", "n03", "n01", "n01", "n02", "n03")):
        picture(root / "val" / "images" / f"val_{i}.JPEG", grey=i == 4)
        annotations.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WORDS))
    (root / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in {"n00": "entity", **WORDS}.items()))
    return root


def test_tiny_imagenet(tiny_imagenet: Path) -> None:
    config = Data(name="tiny-imagenet", root=str(tiny_imagenet.parent))
    test = load_test(config)
    assert test.labels == ("goldfish, Carassius auratus", "crane (n02)", "crane (n03)")
    assert test.classes.tolist() == [1, 2, 0, 0, 1, 2]
    for i, pixels in enumerate(test.pixels):
        decoded = Image.open(tiny_imagenet / "val" / "images" / f"val_{i}.JPEG").convert("RGB")
        assert np.array_equal(pixels, np.asarray(decoded).transpose(2, 0, 1))
    assert np.array_equal(test.pixels[4, 0], test.pixels[4, 2])
    training, validation = load_training(config)
    assert (len(training), len(validation), training.shape) == (27, 3, (3, 64, 64))
    assert len(keys(np.concatenate([training.pixels, validation.pixels]))) == 30
    assert np.bincount([*training.classes, *validation.classes]).tolist() == [10, 10, 10]
    itself = load_test(Data(name="tiny-imagenet", root=str(tiny_imagenet)))
    assert np.array_equal(itself.pixels, test.pixels)


@pytest.mark.parametrize(
    ("file", "content", "train", "expected"),
    [
        ("wnids.txt", None, False, "tiny-imagenet is not under"),
        ("wnids.txt", b"", False, "wnids.txt is empty"),
        ("wnids.txt", b"n01\nn02\nn03\nn09\n", False, "words.txt has no words for class 'n09'"),
        ("words.txt", None, False, "cannot read .*words.txt"),
        ("val/val_annotations.txt", None, False, "cannot read .*val_annotations.txt"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn01\nval_1.JPEG\tn09\t0\n", False, "line 2: 'n09' is not one"),
        ("val/val_annotations.txt", b"val_0.JPEG", False, "line 1: '' is not one"),
        ("val/images/val_3.JPEG", None, False, r"val_3\.JPEG: .*No such file"),
        ("val/images/val_3.JPEG", 500, False, r"cannot decode image .*val_3\.JPEG"),
        ("train/n02/images/n02_7.JPEG", 500, True, r"cannot decode image .*n02_7\.JPEG"),
        ("train/n02/images", None, True, "no images under .*n02"),
    ],
)
def test_a_damaged_tiny_imagenet_is_one_line(
    tiny_imagenet: Path, file: str, content: bytes | int | None, train: bool, expected: str
) -> None:
    """content: what the file holds; how many bytes are left of it; None if it is missing."""
    path = tiny_imagenet / file
    if content is None:
        path.rename(tiny_imagenet.parent / "elsewhere")
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    config = Data(name="tiny-imagenet", root=str(tiny_imagenet.parent))
    with pytest.raises(InputError, match=expected) as error:
        (load_training if train else load_test)(config)
    assert "\n" not in str(error.value)


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
    colours = {0: (255, 0, 0), 1: (0, 255, 0)}
    assert [tuple(p) for p in test.pixels[:, :, 4, 4]] == [colours[k] for k in test.classes.tolist()]
    training, validation = load_training(config)
    assert (len(training), len(validation)) == (18, 2)
    with pytest.raises(InputError, match=r"data\.image_size"):
        load_test(Data(name="imagefolder", root=str(folder)))
    with pytest.raises(InputError, match="one folder per class"):
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


def test_images_are_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "e.png")
    assert np.array_equal(read_image(tmp_path / "e.png", (1, 8, 8)), pixels)
    assert read_image(tmp_path / "e.png", (3, 4, 6)).shape == (3, 4, 6)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png", (1, 8, 8))


def test_a_damaged_image_is_one_line(tmp_path: Path) -> None:
    """A PNG whose data are said to be shorter than they are: for that pillow has a SyntaxError."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(b"IDAT") - 1] -= 6
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot decode image .*a\.png: broken PNG") as error:
        read_image(tmp_path / "a.png", (1, 8, 8))
    assert "\n" not in str(error.value)
