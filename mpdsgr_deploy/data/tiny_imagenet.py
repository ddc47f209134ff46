"""Tiny-ImageNet: 200 classes of 500 training and 50 labelled validation images, 64x64 RGB, in its archive's layout.

    wnids.txt                       the WordNet ids (WNID) of the classes
    words.txt                       WNID <tab> words, for all WordNet ids
    train/WNID/images/*.JPEG
    val/images/*.JPEG               val/val_annotations.txt gives the WNID of each

The labels of the test split were never published, so networks are tested on `val`.
"""

from collections import Counter
from pathlib import Path

from mpdsgr_deploy.data.image_files import files_below, image_suffixes, read_image, read_labelled
from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.errors import InputError, MissingData
from mpdsgr_deploy.recipe import Data

FOLDER = "tiny-imagenet-200"
SHAPE = (3, 64, 64)


def tiny_imagenet(config: Data, train: bool) -> Images:
    """Load the training images or `val` from `root` or `root/tiny-imagenet-200`; grey images become RGB.

    Classes are ordered by WNID, as torchvision's ImageFolder does, so class numbers agree with other code bases. Raises
    MissingData if wnids.txt is missing, InputError for other missing or damaged files.
    """
    folder = Path(config.root)
    if (folder / FOLDER).is_dir():
        folder /= FOLDER
    if not (folder / "wnids.txt").is_file():
        raise MissingData(
            f"{config.name} is not under {config.root!r}; point data.root (or --root) to it, or unpack there: "
            f"http://cs231n.stanford.edu/{FOLDER}.zip"
        )
    wnids = sorted(set(_lines(folder / "wnids.txt")))
    labels = _labels(folder / "words.txt", wnids)
    files = (_training_files if train else _test_files)(folder, wnids)
    return read_labelled(files, read_image, shape=SHAPE, labels=labels, name=config.name)


def _training_files(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    files = []
    for k, wnid in enumerate(wnids):
        images = files_below(folder / "train" / wnid, image_suffixes())
        if not images:
            raise InputError(f"no images under {folder / 'train' / wnid}; unpack {FOLDER}.zip again")
        files += [(path, k) for path in images]
    return files


def _test_files(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    annotations = folder / "val" / "val_annotations.txt"
    classes = {wnid: k for k, wnid in enumerate(wnids)}
    files = []
    for number, line in enumerate(_lines(annotations), 1):
        name, _, class_and_box = line.partition("\t")
        wnid = class_and_box.partition("\t")[0]
        if wnid not in classes:
            raise InputError(
                f"{annotations}, line {number}: {wnid!r} is not one of the classes in wnids.txt; unpack {FOLDER}.zip "
                "again"
            )
        files.append((folder / "val" / "images" / name, classes[wnid]))
    return files


def _labels(path: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the words of each WNID, followed by the WNID if two classes have the same words."""
    entries = (line.partition("\t") for line in _lines(path))
    words = {wnid: text for wnid, _, text in entries}
    unknown = [wnid for wnid in wnids if not words.get(wnid)]
    if unknown:
        raise InputError(f"{path} has no words for class {unknown[0]!r} of wnids.txt; unpack {FOLDER}.zip again")
    uses = Counter(words[wnid] for wnid in wnids)
    return tuple(words[wnid] if uses[words[wnid]] == 1 else f"{words[wnid]} ({wnid})" for wnid in wnids)


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file. Raises InputError if it is missing or empty."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; unpack {FOLDER}.zip again") from None
    if not lines:
        raise InputError(f"{path} is empty; unpack {FOLDER}.zip again")
    return lines
