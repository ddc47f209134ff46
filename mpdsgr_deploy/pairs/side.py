"""One of the two sides of a comparison: a training run, a checkpoint, a bundle or a validation report."""

from pathlib import Path
from typing import NamedTuple

from mpdsgr_deploy.address import local_copy, parse_address
from mpdsgr_deploy.bundle import MANIFEST, Bundle, open_bundle
from mpdsgr_deploy.checkpoint import CHOICES, FILE, Checkpoint, find_checkpoint, load_checkpoint
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.validation.report import REPORT, Report, load_report


class Side(NamedTuple):
    """The content of a path, with exactly one of `checkpoint`, `bundle` and `report`.

    name: the text that the user wrote; kind: "training run", "checkpoint", "bundle" or "report"; directory: that of the
    checkpoint or bundle, or the path of the report; precision: that of the bundle's network; "" for other sides.
    """

    name: str
    kind: str
    directory: Path
    checkpoint: Checkpoint | None = None
    bundle: Bundle | None = None
    precision: str = ""
    report: Report | None = None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the network's training; None for a report, which has none."""
        if self.checkpoint is not None:
            return self.checkpoint.recipe
        return None if self.bundle is None else self.bundle.manifest.recipe

    @property
    def images(self) -> tuple[str, tuple[int, int, int], tuple[str, ...]] | None:
        """The data set, the shape (C, H, W) and the labels of the network; None for a report, which has none."""
        if self.checkpoint is not None:
            return self.checkpoint.recipe.data.name, self.checkpoint.shape, self.checkpoint.labels
        if self.bundle is not None:
            manifest = self.bundle.manifest
            return manifest.recipe.data.name, manifest.input_shape, manifest.labels
        return None


def read_side(text: str) -> Side:
    """Read and verify what `text` names: a directory, the file of a report, or BUNDLE[@PRECISION][@sha256:DIGEST].

    Raises InputError if it is none of these, is damaged, or has no such precision.
    """
    address = parse_address(text)
    path = local_copy(address)
    if (path / MANIFEST).is_file():
        bundle, precision = open_bundle(path), address.precision or "fp32"
        bundle.variant(precision)
        return Side(text, "bundle", path, bundle=bundle, precision=precision)
    if path.is_file() or (path / REPORT).is_file():
        return Side(text, "report", path, report=load_report(path))
    if not any((path / part / FILE).is_file() for part in ("", *CHOICES)):
        raise InputError(f"{text} is not a training run, checkpoint, bundle or report; give the directory of one")
    directory = find_checkpoint(path)
    checkpoint = load_checkpoint(directory)
    return Side(text, "checkpoint" if directory == path else "training run", directory, checkpoint=checkpoint)
