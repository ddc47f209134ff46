"""What a bundle promises: its arrays say what they are, and files of the first schema version are still read."""

import hashlib
from pathlib import Path

import numpy as np

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.recipe import Data
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.reference import digests, images_sha256, load_reference


def test_the_sha256_of_images_is_one_and_covers_pixels_and_classes() -> None:
    images = load_test(Data(name="digits"))[:20]
    expected = hashlib.sha256(images.pixels.tobytes() + images.classes.astype("<i8").tobytes()).hexdigest()
    assert images_sha256(images) == expected
    assert images_sha256(images[::-1][::-1]) == expected
    images.classes[3] += 1
    assert images_sha256(images) != expected


def test_the_array_of_digests_names_its_hash(bundle: Bundle, tmp_path: Path) -> None:
    reference = bundle.reference()
    assert reference is not None
    with np.load(bundle.file("reference.npz")) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    first = load_test(Data(name="digits"))[: len(reference.digests)]
    assert np.array_equal(found["blake2b_64"], digests(first))
    older = tmp_path / "reference.npz"
    np.savez(older, digests=found.pop("blake2b_64"), **found)
    assert np.array_equal(load_reference(older, bundle.manifest.reference).digests, reference.digests)


def test_shipped_bundles_open_whatever_their_schema_version() -> None:
    for path in shipped("export").glob("bundles/*/"):
        assert open_bundle(path).reference() is not None
