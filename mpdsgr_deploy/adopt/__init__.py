"""Bundles of networks that come from elsewhere: any ONNX classifier, spiking or not, attacked and gated as deployed.

    adopt(file, images, out, surrogate="triangle:1")    an ordinary bundle around the user's own ONNX file
    survey(file, surrogate)                             which nodes can be differentiated, and what is in the way

`validate`, `predict`, `serve`, `build`, `inspect` and `deploy` take such a bundle as they take any other.
"""

from mpdsgr_deploy.adopt.classifier import Preprocessing, read_classifier
from mpdsgr_deploy.adopt.survey import Survey, survey
from mpdsgr_deploy.adopt.write import adopt

__all__ = ["Preprocessing", "Survey", "adopt", "read_classifier", "survey"]
