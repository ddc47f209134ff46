"""The file is right; what runs it is not. Golden logits are what that runtime answers."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np

from faults.planted import Array, Planted, fault
from mpdsgr_deploy.bundle import GOLDEN
from mpdsgr_deploy.runtime import OnnxRuntime

Answer = Callable[[OnnxRuntime, Array], Array]


def answer(copy: Planted, how: Callable[[Answer, OnnxRuntime, Array], Array]) -> None:
    """Let onnxruntime's predictors answer as `how` does, which is given the true one."""
    true = OnnxRuntime.__call__
    copy.patch.setattr(OnnxRuntime, "__call__", lambda network, x: how(true, network, x))
    copy.answered_anew |= copy.manifest["variants"].keys()


@fault("runtime", 3, "check 8")
def state_left_between_batches(copy: Planted) -> None:
    """Membranes that are not reset: the batch before is still in them. The first batch, the golden one, is right."""
    left: WeakKeyDictionary[OnnxRuntime, Array] = WeakKeyDictionary()  # a later network may get the id of a freed one

    def leaky(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        before = left.get(network, np.zeros_like(logits[:1]))
        left[network] = logits.mean(0, keepdims=True)
        return logits + np.float32(0.3) * before

    answer(copy, leaky)


@fault("runtime", 3, "check 8")
def answers_depend_on_the_batch(copy: Planted) -> None:
    """A batcher that mixes an image with its neighbour in the batch."""
    answer(copy, lambda true, network, x: true(network, x) + np.float32(0.2) * np.roll(true(network, x), 1, axis=0))


@fault("runtime", 3, "check 8")
def images_beyond_the_profile_swapped(copy: Planted) -> None:
    """An engine for batches of 16 whose last part is written back in the wrong order; the golden batch is smaller."""

    def swapped(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        return np.concatenate([logits[:16], logits[16:][::-1]])

    answer(copy, swapped)


@fault("runtime", 3, "one by one")
def an_image_alone_is_answered_wrongly(copy: Planted) -> None:
    """A dimension of one squeezed away: right in every batch, wrong for a single image."""

    def alone(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        return logits if len(x) > 1 else logits[:, ::-1].copy()

    answer(copy, alone)


@fault("runtime", 3, "in a batch of 7", thorough=True)
def odd_batches_are_answered_wrongly(copy: Planted) -> None:
    """A kernel for pairs of images, whose last one is lost."""

    def pairs(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        return np.roll(logits, 1, axis=1) if len(x) % 2 and len(x) > 1 else logits

    answer(copy, pairs)


@fault("runtime", 3, "check 14")
def an_image_without_a_finite_answer(copy: Planted) -> None:
    """An overflow for one image, beyond those that are asked about repeatedly: its class would be chance."""
    pixels = copy.arrays("images.npz")["pixels"].astype(np.float32) / 255
    dark = pixels[57].sum()

    def overflows(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        logits[np.abs(x.sum((1, 2, 3)) - dark) < 1e-4] = np.nan
        return logits

    answer(copy, overflows)


@fault("runtime", 3, "check 14", thorough=True)
def attacked_images_without_a_finite_answer(copy: Planted) -> None:
    """An overflow for images that are not on the 8-bit grid, as only attacked ones are: every attack seems to win."""

    def overflows(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        between = np.abs(x * 255 - np.rint(x * 255)).max((1, 2, 3)) > 1e-3
        logits[between & (np.arange(len(x)) % 4 == 0)] = np.nan
        return logits

    answer(copy, overflows)


@fault("runtime", 3, "since the attacks began", thorough=True)
def another_model_while_it_is_attacked(copy: Planted) -> None:
    """A server that gets the next model under the same name halfway through: both answer the golden batch alike."""
    asked, golden = 0, copy.arrays(GOLDEN)["inputs"]

    def replaced(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        nonlocal asked
        asked += 1
        logits, alike = true(network, x), (x[:, None] == golden).all((2, 3, 4)).any(1)
        return logits if asked < 9 else np.where(alike[:, None], logits, logits * np.float32(1.01))

    answer(copy, replaced)


@fault("runtime", 3, "check 12")
def softmax_behind_the_network(copy: Planted) -> None:
    """A server that returns probabilities."""

    def softmax(true: Answer, network: OnnxRuntime, x: Array) -> Array:
        logits = true(network, x)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    answer(copy, softmax)


@fault("runtime", 3, "check 12")
def spikes_counted_behind_the_network(copy: Planted) -> None:
    """A server that returns whole counts."""
    answer(copy, lambda true, network, x: np.floor(np.maximum(true(network, x) * 4, 0)))


@fault("runtime", 3, "golden batch wrongly")
def torch_weights_of_another_training(copy: Planted) -> None:
    """The network that is trusted most is not the one that was exported."""
    copy.take("weights.safetensors")
    copy.backend = "torch"
