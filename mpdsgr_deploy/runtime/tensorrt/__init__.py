"""TensorRT and TensorRT-RTX, without torch: build engines, store them in a bundle, run them."""

from mpdsgr_deploy.runtime.tensorrt.engine import BatchSizes, build_engine, prepare
from mpdsgr_deploy.runtime.tensorrt.predictor import TensorRT

__all__ = ["BatchSizes", "TensorRT", "build_engine", "prepare"]
