"""What an exported network knows of its training images."""

from conftest import small_recipe

from mpdsgr_deploy.data.likeness import PixelStatistics
from mpdsgr_deploy.exporting.bundle_writer import pixel_statistics
from mpdsgr_deploy.models import build_model


def test_a_network_that_does_not_normalise_warns_of_no_images() -> None:
    """Mean 0 and spread 1 are those of no images: `validate` called all images unlike them."""
    model = build_model(small_recipe(), (1, 8, 8), 10)
    assert pixel_statistics(model) is None
    model.normalize.set([0.25], [0.5])
    assert pixel_statistics(model) == PixelStatistics(mean=(0.25,), std=(0.5,))
