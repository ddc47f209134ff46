"""TensorRT and TensorRT-RTX, the libraries themselves: engines built, kept in a bundle and run. Neither needs torch."""

from mpdsgr_deploy.runtime.tensorrt.engine import BatchSizes, build_engine
from mpdsgr_deploy.runtime.tensorrt.predictor import TensorRT
from mpdsgr_deploy.runtime.tensorrt.prepare import prepare

__all__ = ["BatchSizes", "TensorRT", "build_engine", "prepare"]
