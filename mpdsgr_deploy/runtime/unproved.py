"""The parts that have never run on a GPU, how they are tested meanwhile, and the step of benchmarks/gpu.py for each.

A row is removed once a result of that step has been published.
"""

from typing import NamedTuple


class Unproved(NamedTuple):
    """A claim, how it is tested without a GPU, and the step that will prove it on one."""

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
