"""Predictors: one network, one backend. Open one from a bundle with `open_predictor`. torch is not imported here."""

from mpdsgr_deploy.runtime.image_batches import check_images, predict
from mpdsgr_deploy.runtime.image_noise import NoiseSource
from mpdsgr_deploy.runtime.onnx_runtime import OnnxRuntime
from mpdsgr_deploy.runtime.open import BACKENDS, open_predictor

__all__ = ["BACKENDS", "NoiseSource", "OnnxRuntime", "check_images", "open_predictor", "predict"]
