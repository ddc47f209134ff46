"""Folders of images, one subfolder per class, in the layout of torchvision's ImageFolder.

    root/train/CLASS/NAME.png
    root/test/CLASS/NAME.png        or val/, valid/, validation/

The classes are the subfolders of train/, sorted, or those of the test split if there is no train/.
"""

from collections import Counter
from pathlib import Path

from mpdsgr_deploy.data.image_files import class_folders, image_suffixes, passed_over, read_image, read_labelled, walk
from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Data

TRAIN, TEST = "train", ("test", "val", "valid", "validation")  # the first of these names that exists is the test split


def imagefolder(config: Data, train: bool) -> Images:
    """Load the training or the test split, decoded to RGB [3, S, S] with S = data.image_size.

    Raises MissingData if `root` has neither split; InputError for a missing split, a missing image_size, a damaged
    image, and a class that is empty or in one split only. Loading training images also checks the folders of the test
    split, so that its faults show before training.
    """
    if config.image_size is None:
        raise InputError("data set 'imagefolder' needs data.image_size, the side in pixels to which images are resized")
    root = Path(config.root)
    training, test = root / TRAIN, _test_folder(root)
    if not training.is_dir() and test is None:
        raise MissingData(
            f"there are no images under {root}; put them at {training}/CLASS/NAME.png and "
            f"{root / TEST[0]}/CLASS/NAME.png, with one folder per class"
        )
    folder = training if train else test
    if folder is None or not folder.is_dir():
        raise InputError(f"{root} has no {TRAIN}/" if train else f"{root} has none of {', '.join(TEST)}")
    labels = class_folders(training if training.is_dir() else folder)
    files = _files(folder, labels)
    if train and test is None:
        log.warning(
            "%s has no test split (%s), so a network that is trained on it cannot be validated on it",
            root,
            ", ".join(TEST),
        )
    elif train and test is not None:
        _files(test, labels)
    shape = (3, config.image_size, config.image_size)
    return read_labelled(files, read_image, shape=shape, labels=tuple(labels), name=config.name)


def _test_folder(root: Path) -> Path | None:
    return next((root / name for name in TEST if (root / name).is_dir()), None)


def _files(folder: Path, labels: list[str]) -> list[tuple[Path, int]]:
    """List the images of a split with their classes. Raises InputError unless exactly the classes `labels` have any."""
    unknown = [name for name in class_folders(folder) if name not in labels]
    if unknown:
        raise InputError(f"{folder} has a class {unknown[0]!r} that {TRAIN}/ does not have; rename or remove it")
    files, counts = [], Counter[str]()
    for k, label in enumerate(labels):
        walked = walk(folder / label, image_suffixes()) if (folder / label).is_dir() else None
        if walked is None or not walked.files:
            others = passed_over(walked.passed_over) if walked else ""
            ignored = f" (ignored: {others})" if others else ""
            raise InputError(
                f"{folder / label} has no images{ignored}; each class needs images in every split, in a format that "
                "Pillow reads"
            )
        files += [(path, k) for path in walked.files]
        counts += walked.passed_over
    if not files:
        raise InputError(
            f"there are no images under {folder}; put them at {folder}/CLASS/NAME.png, with one folder per class"
        )
    if counts:
        log.warning("%s: %d images; ignored %s", folder, len(files), passed_over(counts))
    return files
