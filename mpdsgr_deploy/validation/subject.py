"""The subject of a validation: all that is decided before the first attack."""

import json
from pathlib import Path
from typing import NamedTuple

from mpdsgr_deploy import __version__
from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.attacks.resumable_run import Journal
from mpdsgr_deploy.attacks.suite import Suite
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.data.likeness import Likeness
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.reference import Reference, images_sha256
from mpdsgr_deploy.validation.comparison import Comparison
from mpdsgr_deploy.validation.target import Target, fingerprint


class Subject(NamedTuple):
    """What a validation evaluates, with which attacks, on which images, and what it compares the result with.

    gate: the settled rules. data: the name of the data set to which `images` belong. own: the images of that data set
    on this machine, None if it is not there. reference: the bundle's reference, None for images of another data set.
    comparison: those of its verdicts that can be compared under the attacks of `suite`. journal: keeps finished
    batches, None to keep none.
    """

    target: Target
    suite: Suite
    gate: Gate
    images: Images
    data: str
    own: Images | None
    reference: Reference | None
    comparison: Comparison
    journal: Journal | None

    @property
    def rule(self) -> str:
        """A phrase that names the images and how they were chosen."""
        return name_sample(len(self.images), self.data)

    @property
    def batch_size(self) -> int:
        """Images per batch. Results depend on it only by rounding."""
        return self.target.bundle.manifest.recipe.validation.batch_size

    @property
    def names(self) -> list[str]:
        """The names of all conditions, with "clean" first and "worst" last."""
        return [CLEAN, *(condition.name for condition in self.suite.conditions), WORST]


def identity(subject: Subject, transfer: Path | None) -> str:
    """Return everything that the result of a batch depends on, as text: batches are reused only if it is equal."""
    target, manifest = subject.target, subject.target.bundle.manifest
    networks = [target.bundle.model_sha256(precision) for precision in (target.precision, "fp32")]
    engines = [
        [made.model_dump(mode="json"), manifest.files.get(made.file or "")]
        for made in target.bundle.prepared(target.backend, target.precision)
    ]
    attacks = [repr(condition) for condition in subject.suite.conditions]
    what = [__version__, attacks, *networks, manifest.recipe.model_dump(mode="json")]
    where = [target.backend, target.url, engines, subject.gate.tier, subject.batch_size]
    images = [len(subject.images), images_sha256(subject.images)]
    return json.dumps([*what, *where, *images, None if transfer is None else fingerprint(transfer)])


def warn_of_gaps(compared: Comparison, tier: str, bundle: Bundle) -> None:
    """Warn of conditions that are not compared, because the reference never met them with these settings."""
    promise = bundle.manifest.reference
    if promise is not None and compared.verdicts and compared.alone:
        log.warning(
            "the reference was attacked with tier %s and the artefact is attacked with tier %s, so these "
            "conditions are not compared: %s; validate with --tier %s, or export with --tier %s",
            *(promise.tier, tier, ", ".join(compared.alone), promise.tier, tier),
        )


def warn_if_unlike(target: Target, images: Images) -> None:
    """Warn if mean or spread of the pixels differ from the training images', as they do in inverted images."""
    trained = target.bundle.manifest.pixels
    if trained is not None and (unlike := Likeness(trained).add(images.pixels).warning()):
        log.warning("%s", unlike)
