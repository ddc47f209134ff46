"""A reduced precision is wrong. Its answers are not torch's anyway, and those kept for int8 were computed by the very
file that is wrong: its float32 sibling and the verdicts must tell.
"""

import shutil

import numpy as np
from onnx import helper

from faults.artefact import four_bits, noisy
from faults.planted import Planted, fault


@fault("artefact", 1, "round activations that are exact in float32", precision="int8")
def spikes_quantised_too_coarsely(copy: Planted) -> None:
    """Pooled spikes are quarters; a scale for whole ones rounds them away."""
    copy.change("conv2/step", lambda step: step * 4)


@fault("artefact", 1, "round activations that are exact in float32", precision="int8")
def spikes_quantised_too_finely(copy: Planted) -> None:
    """A scale so small that a spike is cut off at the largest int8."""
    copy.change("conv3/step", lambda step: step / 256)


@fault("artefact", 1, "weights of conv2", precision="int8")
def int8_weights_of_one_convolution_in_4_bits(copy: Planted) -> None:
    """A quantiser set to int4 for a layer."""
    copy.change("conv2/weights", lambda weights: four_bits(weights.astype(np.float32)))


@fault("artefact", 1, "weights of conv2", precision="int8")
def one_scale_for_all_channels(copy: Planted) -> None:
    """Scales per tensor written where the weights were rounded per channel."""
    copy.change("conv2/scales", lambda scales: np.full_like(scales, scales.mean()))


@fault("artefact", 1, "weights of conv1", precision="int8")
def int8_of_another_training(copy: Planted) -> None:
    """A variant left over from the export before."""
    copy.take("model.int8.onnx")


@fault("artefact", 1, "not stored in int8", precision="int8")
def int8_that_is_float32(copy: Planted) -> None:
    """A converter that gave up without a word: right answers, at four times the size and none of the speed."""
    shutil.copyfile(copy.path / "model.fp32.onnx", copy.path / "model.int8.onnx")
    copy.answered_anew.add("int8")


@fault("artefact", 1, "differs from the float32 network", precision="int8", thorough=True)
def int8_leak_perturbed(copy: Planted) -> None:
    """A time constant rounded with the weights, in the int8 file alone."""
    copy.export_as(neuron={"tau": 0.52})


@fault("artefact", 1, "weights of conv2", precision="fp16")
def fp16_weights_of_one_convolution_noisy(copy: Planted) -> None:
    """Noise of 5 % of their deviation in one layer of the float16 file."""
    copy.change("body.2.synapse.weight", noisy)


@fault("artefact", 1, "a constant of conv3", precision="fp16")
def fp16_bias_too_small(copy: Planted) -> None:
    """A converter that scales the bias of one layer by the step of something else."""
    copy.change("body.3.synapse.bias", lambda bias: bias * 0.9)


@fault("artefact", 1, "differs from the float32 network", precision="fp16")
def fp16_leak_perturbed(copy: Planted) -> None:
    """A time constant rounded in the float16 file alone."""
    copy.export_as(neuron={"tau": 0.52})


@fault("artefact", 3, "check 8", precision="fp16")
def fp16_with_fresh_noise(copy: Planted) -> None:
    """Dropout left on in the float16 file, too weak to change a golden label."""
    noise = helper.make_node("RandomNormal", [], ["noise"], shape=[1, 10], scale=0.01)
    copy.append(noise, helper.make_node("Add", ["raw", "noise"], ["logits"]))


@fault("artefact", 1, "differs from the float32 network", precision="fp8", thorough=True)
def fp8_threshold_perturbed(copy: Planted) -> None:
    """A threshold in another unit in the float8 file alone."""
    copy.export_as(neuron={"v_threshold": 1.03})


@fault("artefact", 1, "weights of conv1", precision="fp8")
def fp8_weights_of_another_training(copy: Planted) -> None:
    """A variant left over from the export before."""
    copy.take("model.fp8.onnx")
