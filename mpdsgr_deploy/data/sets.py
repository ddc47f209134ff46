"""The data sets by name, in DATASETS, and the splits that training and validation use.

A loader is `load(config, train) -> Images`, where `train` asks for the training images.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mpdsgr_deploy.data.events import RECORDINGS, SIDE, read_frames
from mpdsgr_deploy.data.image_files import files_below, read_labelled
from mpdsgr_deploy.data.imagefolder import imagefolder
from mpdsgr_deploy.data.images import Images, in_sampling_order
from mpdsgr_deploy.data.tiny_imagenet import tiny_imagenet
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.registry import Registry

SPLIT_SEED = 0  # splits and subsets are the same for every training seed, so that runs can be compared


def digits(config: Data, train: bool) -> Images:
    """Load scikit-learn's 1,797 handwritten digits, 8x8 in grey: 1,300 for training, 497 for tests."""
    table = _digits_table()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(table))
    chosen = table[order[:1300] if train else order[1300:]]
    pixels = np.rint(chosen[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Images(pixels, chosen[:, -1].astype(np.int64), tuple("0123456789"))


@cache
def _digits_table() -> np.ndarray:
    """Return 64 pixels in [0, 16] and the class of each digit: float64 [1797, 65].

    The file of scikit-learn is read directly if it is in its usual place, because importing scikit-learn takes seconds.
    """
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    raw = need("sklearn.datasets", "train").load_digits()
    return np.column_stack([raw.data, raw.target])


def torchvision_set(class_name: str) -> Callable[[Data, bool], Images]:
    """Return a loader of the data set that torchvision's class reads from `data.root`.

    The loader raises MissingData if it is not there, InputError if it is damaged.
    """

    def load(config: Data, train: bool) -> Images:
        dataset_class = getattr(need("torchvision.datasets", "train"), class_name)
        try:
            dataset = dataset_class(config.root, train=train)
        except (RuntimeError, ValueError, AssertionError, EOFError, OSError):  # for missing or damaged files
            advice = (
                f"point data.root (or --root) to it, or fetch it with: "
                f'python -c "import torchvision; torchvision.datasets.{class_name}({config.root!r}, download=True)"'
            )
            folder = Path(config.root) / getattr(dataset_class, "base_folder", class_name)
            if folder.is_dir():
                raise InputError(f"{config.name} is damaged or incomplete in {folder}; {advice}") from None
            raise MissingData(f"{config.name} is not under {config.root!r}; {advice}") from None
        pixels = np.asarray(dataset.data)
        # MNIST's pixels are [N, H, W], CIFAR's [N, H, W, C]
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        return Images(np.ascontiguousarray(pixels), np.asarray(dataset.targets, np.int64), tuple(dataset.classes))

    return load


def n_mnist(config: Data, train: bool) -> Images:
    """Load the event recordings `root/Train/DIGIT/*.bin` or `root/Test/DIGIT/*.bin` as data.frames frames each.

    Raises MissingData if `root` has neither folder, InputError without data.frames and for missing or damaged files.
    """
    if config.frames is None:
        raise InputError(
            f"data set {config.name!r} needs data.frames, the number of frames into which a recording is cut"
        )
    labels = tuple("0123456789")
    files = []
    root = Path(config.root)
    is_missing = not ((root / "Train").is_dir() or (root / "Test").is_dir())
    for k, label in enumerate(labels):
        folder = root / ("Train" if train else "Test") / label
        recordings = files_below(folder, {RECORDINGS})
        if not recordings:
            raise (MissingData if is_missing else InputError)(
                f"no recordings in {folder}; point data.root (or --root) to where Train.zip and Test.zip of "
                f"{config.name} are unpacked (https://www.garrickorchard.com/datasets/n-mnist)"
            )
        files += [(path, k) for path in recordings]
    shape = (2 * config.frames, SIDE, SIDE)
    return read_labelled(files, read_frames, shape=shape, labels=labels, name=config.name)


Loader = Callable[[Data, bool], Images]  # (config, whether to load the training images)
BUILT_IN: dict[str, Loader] = {
    "digits": digits,
    "cifar10": torchvision_set("CIFAR10"),
    "cifar100": torchvision_set("CIFAR100"),
    "mnist": torchvision_set("MNIST"),
    "fashion-mnist": torchvision_set("FashionMNIST"),
    "imagefolder": imagefolder,
    "tiny-imagenet": tiny_imagenet,
    "n-mnist": n_mnist,
}
DATASETS = Registry("data set", "mpdsgr_deploy.datasets", BUILT_IN)


def _load(config: Data, train: bool) -> Images:
    """Load a split; a leading ~ in the root stands for the user's home directory."""
    return DATASETS.choose(config.name)(config.at(str(Path(config.root).expanduser())), train)


def load_test(config: Data) -> Images:
    """Load the test images, unseen in training and model selection, in an order whose every prefix samples all classes.

    Raises MissingData if the data set is not on this machine, InputError if it is unknown, damaged or incomplete.
    """
    return in_sampling_order(_load(config, False))


def load_training(config: Data) -> tuple[Images, Images]:
    """Load the training images, and the validation images that are held out of them; both are the same for every seed.

    Raises InputError as `load_test` does, and if there are too few images for data.train_images or validation_share.
    """
    images = _load(config, True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    held_out = round(config.validation_share * len(images))
    training_order = order[held_out:]
    if config.train_images is not None:
        if config.train_images > len(training_order):
            raise InputError(
                f"data.train_images is {config.train_images}, but {config.name} leaves {len(training_order)} training "
                "images after the validation split"
            )
        training_order = training_order[: config.train_images]
    if not held_out or not len(training_order):
        raise InputError(
            f"{config.name} has only {len(images)} training images, too few for data.validation_share; raise it"
        )
    return images[training_order], images[order[:held_out]]
