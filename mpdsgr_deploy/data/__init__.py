"""Data sets by name, for training and validation alike: `load_training` and `load_test` return uint8 `Images`."""

from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.data.sets import DATASETS, load_test, load_training

__all__ = ["DATASETS", "Images", "load_test", "load_training"]
