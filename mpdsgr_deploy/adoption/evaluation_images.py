"""Labelled images for a network that was trained elsewhere: a named data set, a folder of classes, or an .npz file."""

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.data.image_files import class_folders, files_below, image_suffixes, read_image, read_labelled
from mpdsgr_deploy.data.images import in_sampling_order
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Data


def evaluation_images(source: str, root: str | None, shape: tuple[int, int, int] | None, limit: int | None) -> Images:
    """Read at most `limit` (None: all) labelled images of `shape` (C, H, W), or of any shape if it is None.

    source: a folder with files CLASS/NAME.png; an .npz file with the arrays pixels (uint8 [N, C, H, W]), classes (int
    [N]) and optionally labels (str [K]); or the name of a registered data set, whose files are in `root`. Raises
    InputError for images of another shape, for a source that cannot be read, and for a `root` of another source.
    """
    path = Path(source)
    if root is not None and (path.is_dir() or path.suffix == ".npz"):
        raise InputError(f"{source} is not the name of a data set, whose directory --root gives; leave --root out")
    if path.is_dir():
        if shape is None:
            raise InputError(
                f"{path} is a folder, and its images have no common size for this network; give an .npz file or the "
                "name of a data set"
            )
        images = _folder(path, shape)
    elif path.suffix == ".npz":
        images = _archive(path)
    else:
        images = load_test(Data(name=source, image_size=None if shape is None else shape[1]).at(root))
    if shape is not None and images.shape != shape:
        raise InputError(f"the images of {source} have shape {images.shape}; the network takes {shape} (C, H, W)")
    return images[:limit] if limit else images


def _folder(path: Path, shape: tuple[int, int, int]) -> Images:
    labels = tuple(class_folders(path))
    files = [(file, k) for k, label in enumerate(labels) for file in files_below(path / label, image_suffixes())]
    if not files:
        raise InputError(
            f"there are no images under {path}; put them at {path}/CLASS/NAME.png, with one folder per class"
        )
    return in_sampling_order(read_labelled(files, read_image, shape=shape, labels=labels, name=path.name))


def _archive(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, classes = arrays["pixels"], arrays["classes"]
            labels = tuple(map(str, arrays["labels"])) if "labels" in arrays else ()
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(
            f"{path} does not hold the arrays pixels and classes ({error}); write it with numpy.savez"
        ) from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or classes.shape != pixels.shape[:1]:
        raise InputError(f"{path}: pixels must be uint8 [N, C, H, W] and classes int [N]")
    if classes.dtype.kind not in "iu" or (len(classes) and classes.min() < 0):
        raise InputError(f"{path}: classes must be whole numbers, counted from 0")
    count = int(classes.max(initial=-1)) + 1
    return in_sampling_order(Images(pixels, classes.astype(np.int64), labels or tuple(map(str, range(count)))))


def relabelled(images: Images, labels: Sequence[str], classes: int) -> Images:
    """Return the images with class names `labels` or, if that is empty, with their own.

    classes: the number of logits. Raises InputError unless there is one name per logit, and for a class without one.
    """
    names = tuple(labels)
    if not names and len(images.labels) < classes and all(label.isdecimal() for label in images.labels):
        names = tuple(map(str, range(classes)))  # the archive has no names, and not an image of every class
    names = names or images.labels
    if len(names) != classes:
        raise InputError(
            f"the network has {classes} logits and there are {len(names)} labels ({', '.join(names[:5])}, ...); give "
            "one label per logit with --labels"
        )
    if int(images.classes.max(initial=0)) >= classes:
        raise InputError(
            f"an image has class {images.classes.max()}, but the network has {classes} logits, for classes from 0 to "
            f"{classes - 1}"
        )
    return Images(images.pixels, images.classes, names)
