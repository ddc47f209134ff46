"""TensorRT-RTX, which builds engines without a GPU."""

from mpdsgr_deploy.runtime.tensorrt import cuda
from mpdsgr_deploy.runtime.tensorrt.library import load

RTX = "tensorrt-rtx"


def check_header(plan: bytes) -> None:
    """TensorRT-RTX finds nothing damaged in the plan's header; whether this machine runs it is another question."""
    trt = load(RTX)
    cuda.refuse_invalid(trt, trt.Runtime(trt.Logger()), plan, "")
