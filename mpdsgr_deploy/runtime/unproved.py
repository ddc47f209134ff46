"""What has never run on a GPU, how it is tested meanwhile, and which step of benchmarks/gpu.py will prove it.

A row goes when a published result of that step has answered it.
"""

from typing import NamedTuple


class Unproved(NamedTuple):
    """What is claimed, how it is tested without a GPU, and by which step it will be proved on one."""

    what: str
    tested: str
    step: str


UNPROVED = (
    Unproved("Triton kernels of the LIF neuron", "in Triton's interpreter, and compiled for sm_90", "kernels"),
    Unproved("onnxruntime-cuda, its plug-in", "choice of provider and errors, with stand-ins", "providers"),
    Unproved("verdicts on a GPU equal those on a CPU", "not at all", "providers"),
    Unproved("attack graph on CUDA", "on onnxruntime's CPU provider", "attack"),
    Unproved("training on GPUs, several of them, several nodes", "on CPUs, as processes on one machine", "training"),
    Unproved("CIFAR-10 at the paper's size", "small networks on a CPU", "cifar10"),
    Unproved("tensorrt, onnxruntime-tensorrt", "not at all: no library without a GPU", "inference"),
    Unproved("tensorrt-rtx", "engines are built, CUDA calls recorded by a stand-in", "inference"),
)
