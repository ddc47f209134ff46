"""Bundles of networks that were trained elsewhere: any ONNX classifier, spiking or not.

    adopt(file, images, out, surrogate="triangle:1")    writes a bundle around the user's own ONNX file
    survey(network, surrogate)                          says which nodes an attack can differentiate, and which not

`validate`, `predict`, `serve`, `build`, `inspect` and `deploy` take such a bundle like any other.
"""

from mpdsgr_deploy.adoption.classifier import Preprocessing, read_classifier
from mpdsgr_deploy.adoption.survey import Survey, survey
from mpdsgr_deploy.adoption.write import adopt

__all__ = ["Preprocessing", "Survey", "adopt", "read_classifier", "survey"]
