"""The float32 network is wrong. Whoever wrote it took the golden logits from it, so that they agree: only what the
torch network answered, kept in the bundle, can tell.
"""

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from faults.planted import Planted, fault
from mpdsgr_deploy.bundle import WEIGHTS

ANSWERS = "answers differ from those of the exported network"


@fault("artefact", 1, ANSWERS)
def mean_of_the_normalisation_off(copy: Planted) -> None:
    """An exporter that takes the mean of another data set."""
    copy.change("normalize.mean", lambda mean: mean + 0.2)


@fault("artefact", 1, ANSWERS)
def deviation_of_the_normalisation_off(copy: Planted) -> None:
    """An exporter that takes the deviation of another data set."""
    copy.change("normalize.std", lambda std: std * 0.7)


@fault("artefact", 1, ANSWERS)
def normalisation_left_out(copy: Planted) -> None:
    """An exporter that leaves preprocessing to the server, which does not know."""
    copy.change("normalize.mean", np.zeros_like)
    copy.change("normalize.std", np.ones_like)


@fault("artefact", 1, ANSWERS, kind="colour")
def channels_in_another_order(copy: Planted) -> None:
    """An exporter whose images come from a library that reads BGR."""
    copy.change("body.0.synapse.weight", lambda weights: weights[:, ::-1])


@fault("artefact", 1, ANSWERS)
def fewer_time_steps(copy: Planted) -> None:
    """An exporter unrolled with its own default T, to be faster."""
    copy.export_as(encoding={"T": 1})


@fault("artefact", 1, ANSWERS, thorough=True)
def more_time_steps(copy: Planted) -> None:
    """The same the other way round: T of the recipe, and one."""
    copy.export_as(encoding={"T": 3})


@fault("artefact", 1, ANSWERS)
def leak_perturbed(copy: Planted) -> None:
    """A neuron written with another library's time constant."""
    copy.export_as(neuron={"tau": 0.55})


@fault("artefact", 1, ANSWERS, thorough=True)
def threshold_perturbed(copy: Planted) -> None:
    """A threshold rounded, or scaled together with something that was not."""
    copy.export_as(neuron={"v_threshold": 1.05})


@fault("artefact", 1, ANSWERS, thorough=True)
def soft_reset_for_a_hard_one(copy: Planted) -> None:
    """A neuron written after another paper: it subtracts the threshold where the recipe's goes to zero."""
    copy.export_as(neuron={"reset": "soft"})


@fault("artefact", 1, ANSWERS)
def weights_of_one_convolution_in_4_bits(copy: Planted) -> None:
    """A compressor that went over the float32 file as well."""
    copy.change("body.2.synapse.weight", four_bits)


@fault("artefact", 1, ANSWERS)
def weights_of_one_convolution_noisy(copy: Planted) -> None:
    """Noise of 5 % of their deviation: an average over epochs, or analogue hardware."""
    copy.change("body.2.synapse.weight", noisy)


@fault("artefact", 1, ANSWERS)
def bias_dropped(copy: Planted) -> None:
    """A converter that knows convolutions without bias only: what tdBN's shift was folded into is gone."""
    copy.change("body.2.synapse.bias", np.zeros_like)


@fault("artefact", 1, ANSWERS)
def tdbn_folded_twice(copy: Planted) -> None:
    """Two passes that each fold the normalisation into the convolution before it."""
    raw = load_file(copy.path / WEIGHTS)["body.2.synapse.weight"]
    folded = copy.constants()["body.2.synapse.weight"]
    scale = (folded * raw).sum((1, 2, 3)) / (raw * raw).sum((1, 2, 3))
    copy.change("body.2.synapse.weight", lambda weights: weights * scale[:, None, None, None])
    copy.change("body.2.synapse.bias", lambda bias: 2 * bias)


@fault("artefact", 2, "unknown sizes")
def statistics_of_the_batch(copy: Planted) -> None:
    """A normalisation exported in training mode: each image is centred on the batch it comes in."""
    copy.append(
        helper.make_node("ReduceMean", ["raw", "batch"], ["average"]),
        helper.make_node("Sub", ["raw", "average"], ["logits"]),
        batch=np.array([0]),
    )


@fault("artefact", 3, "check 12")
def spikes_counted_in_place_of_logits(copy: Planted) -> None:
    """An exporter that ends the network in output neurons and counts their spikes."""
    levels = {f"level{k}": np.array(0.25 * k, np.float32) for k in range(4)}
    fires = [
        node
        for k in range(4)
        for node in (
            helper.make_node("GreaterOrEqual", ["raw", f"level{k}"], [f"fires{k}"]),
            helper.make_node("Cast", [f"fires{k}"], [f"spikes{k}"], to=TensorProto.FLOAT),
        )
    ]
    sums = [("spikes0", "spikes1", "sum1"), ("sum1", "spikes2", "sum2"), ("sum2", "spikes3", "logits")]
    copy.append(*fires, *(helper.make_node("Add", [a, b], [c]) for a, b, c in sums), **levels)


@fault("artefact", 3, "probabilities")
def softmax_at_the_end(copy: Planted) -> None:
    """An exporter that returns probabilities, since users like them."""
    copy.append(helper.make_node("Softmax", ["raw"], ["logits"]))


@fault("artefact", 1, ANSWERS)
def logits_a_thousand_times_as_large(copy: Planted) -> None:
    """The same labels, but a loss that saturates: its gradient vanishes in float32."""
    copy.append(helper.make_node("Mul", ["raw", "factor"], ["logits"]), factor=np.array(1000, np.float32))


@fault("artefact", 1, ANSWERS)
def rows_of_the_readout_swapped(copy: Planted) -> None:
    """Classes sorted by name in training and by number in the exporter."""
    copy.change("readout.weight", lambda weights: weights[[1, 0, *range(2, 10)]])
    copy.change("readout.bias", lambda bias: bias[[1, 0, *range(2, 10)]])


@fault("artefact", 3, "check 8")
def fresh_noise_on_the_logits(copy: Planted) -> None:
    """A defence by randomness, or dropout left on: every call answers otherwise."""
    noise = helper.make_node("RandomNormal", [], ["noise"], shape=[1, 10], scale=0.05)
    copy.append(noise, helper.make_node("Add", ["raw", "noise"], ["logits"]))


@fault("artefact", 2, "RandomNormalLike")
def fresh_noise_on_the_images(copy: Planted) -> None:
    """The same before the network, which hides the gradient as well."""
    noise = helper.make_node("RandomNormalLike", ["images"], ["noise"], scale=0.02)
    copy.prepend(noise, helper.make_node("Add", ["images", "noise"], ["seen"]))


@fault("artefact", 2, "Round")
def images_rounded_to_bytes_inside(copy: Planted) -> None:
    """A server's byte images moved into the graph: byte images are answered alike, but there is no gradient."""
    copy.prepend(
        helper.make_node("Mul", ["images", "levels"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Div", ["rounded", "levels"], ["seen"]),
        levels=np.array(255, np.float32),
    )


@fault("artefact", 1, ANSWERS)
def network_of_another_training(copy: Planted) -> None:
    """A script that picks the newest file of the wrong folder."""
    copy.take("model.fp32.onnx")


def four_bits(weights: np.ndarray) -> np.ndarray:
    """Rounded to 4 bits, a scale per output channel."""
    step = np.abs(weights).max((1, 2, 3), keepdims=True) / 7
    return np.rint(weights / step) * step


def noisy(weights: np.ndarray) -> np.ndarray:
    """With noise of 5 % of their deviation."""
    return weights + np.random.default_rng(0).normal(0, 0.05 * weights.std(), weights.shape)
