"""Named data sets behind one loader. Images are uint8 arrays in memory; training and validation share them."""

from mpdsgr_deploy.data.images import Images
from mpdsgr_deploy.data.sets import DATASETS, load_test, load_training

__all__ = ["DATASETS", "Images", "load_test", "load_training"]
