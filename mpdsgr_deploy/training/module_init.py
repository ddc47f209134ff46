"""Start a training run from any torch module whose layers map one to one onto the recipe's network.

Convolutions and linear layers, each with the normalisation behind it, are matched in the order in which the module
registers them, by kind and shape. tdBN, unlike batch normalisation, multiplies by alpha V_th, so its weight is divided
by that. A bias before a normalisation is subtracted from the running mean. The neurons are the recipe's: how much they
differ from the module's shows in the share of training images with equal predictions, which is logged and recorded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import InputError, one_line
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.snn.tdbn import TdBN

SYNAPSES = (nn.Conv2d, nn.Linear)
BATCH = 100  # images per forward pass
ALIKE = 0.9  # share of images with equal predictions below which a warning is logged


class Layer(NamedTuple):
    """A synapse (convolution or linear layer) with the normalisation that is registered after it."""

    name: str
    synapse: nn.Conv2d | nn.Linear
    norm_name: str = ""
    norm: TdBN | nn.BatchNorm1d | nn.BatchNorm2d | None = None


def layers(network: nn.Module) -> list[Layer]:
    """Return the layers of a network in the order in which it registers them."""
    registered: list[Layer] = []
    for name, part in network.named_modules():
        if isinstance(part, SYNAPSES):
            registered.append(Layer(name, part))
        elif isinstance(part, TdBN | nn.BatchNorm1d | nn.BatchNorm2d) and registered and registered[-1].norm is None:
            registered[-1] = registered[-1]._replace(norm_name=name, norm=part)
    return registered


def mapped_weights(module: nn.Module, network: nn.Module) -> dict[str, Tensor]:
    """Return the entries of the network's state that follow from the module's layers, as copies by name.

    Raises InputError for the first layer without a counterpart of the same kind, shape, settings and normalisation.
    """
    theirs, ours = layers(module), layers(network)
    if len(theirs) != len(ours):
        raise InputError(
            f"the module has {len(theirs)} layers with weights ({_names(theirs)}), this recipe's network {len(ours)} "
            f"({_names(ours)}); give a recipe whose section model has the same layers"
        )
    weights = {  # the module takes pixels in [0, 1], so the network's own normalisation must not change them
        name: torch.full_like(tensor, float(name == "normalize.std"))
        for name, tensor in network.state_dict().items()
        if name in ("normalize.mean", "normalize.std")
    }
    for their, our in zip(theirs, ours, strict=True):
        _check(their, our)
        weights |= _of_layer(their, our)
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _names(layers_of_network: list[Layer]) -> str:
    return ", ".join(f"{layer.name} {list(layer.synapse.weight.shape)}" for layer in layers_of_network[:4])


def _check(their: Layer, our: Layer) -> None:
    kinds = [next(kind.__name__ for kind in SYNAPSES if isinstance(layer.synapse, kind)) for layer in (their, our)]
    shapes = [list(layer.synapse.weight.shape) for layer in (their, our)]
    if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
        raise InputError(
            f"the module's layer {their.name} is a {kinds[0]} {shapes[0]}, the recipe's {our.name} a {kinds[1]} "
            f"{shapes[1]}; give a recipe whose section model has the same layers"
        )
    if (their.norm is None) != (our.norm is None):
        has, lacks = (our, their) if their.norm is None else (their, our)
        raise InputError(
            f"layer {has.name} is normalised and its counterpart {lacks.name} is not, so their weights cannot be "
            "copied; give a recipe with the same layers"
        )
    for name in ("stride", "padding", "dilation", "groups") if isinstance(our.synapse, nn.Conv2d) else ():
        value = getattr(our.synapse, name)
        if getattr(their.synapse, name) != value:
            raise InputError(
                f"the module's layer {their.name} has {name} {getattr(their.synapse, name)}, the recipe's {value}"
            )


def _of_layer(their: Layer, our: Layer) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {f"{our.name}.weight": their.synapse.weight}
    bias = their.synapse.bias
    if our.norm is None:
        if our.synapse.bias is None and bias is not None:
            raise InputError(
                f"the module's layer {their.name} has a bias, and the recipe's {our.name} has none; give a recipe "
                "with the same layers"
            )
        if our.synapse.bias is not None:
            weights[f"{our.name}.bias"] = torch.zeros_like(our.synapse.bias) if bias is None else bias
        return weights
    norm, name = their.norm, our.norm_name
    assert norm is not None
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise InputError(
            f"the normalisation after the module's layer {their.name} has no running statistics; set "
            "track_running_stats"
        )
    factor = our.norm.alpha * our.norm.v_threshold if isinstance(our.norm, TdBN) else 1.0
    gain = norm.scale if isinstance(norm, TdBN) else torch.ones_like(mean) if norm.weight is None else norm.weight
    correction = torch.sqrt(variance + our.norm.eps) / torch.sqrt(variance + norm.eps)  # for different epsilons
    return {
        **weights,
        f"{name}.weight": gain * correction / factor,
        f"{name}.bias": torch.zeros_like(mean) if norm.bias is None else norm.bias,
        f"{name}.running_mean": mean if bias is None else mean - bias,
        f"{name}.running_var": variance,
    }


def start_from_module(module: nn.Module, name: str, networks: Sequence[nn.Module], images: Images) -> dict[str, Any]:
    """Copy a module's weights into `networks`, all of the same architecture; return the checkpoint's record of them.

    module: takes pixels in [0, 1]; it is put into eval mode on the CPU. name: what the log and the record call it.
    images: those on which the predictions of module and network are compared. The record has the entries module,
    weights_sha256, alike (the share of equal predictions) and images (their number). Raises InputError as
    `mapped_weights` does, and for a module that does not take these images.
    """
    module = module.eval().cpu()
    weights = mapped_weights(module, networks[0])
    for network in networks:
        network.load_state_dict(weights, strict=False)
    alike = _alike(module, networks[0], images)
    log.info(
        "the network with the weights of %s gives the same class as it for %.1f %% of %d images",
        name,
        100 * alike,
        len(images),
    )
    if alike < ALIKE:
        log.warning(
            "the recipe's neurons differ from those of %s; compare neuron.tau, v_threshold, neuron.reset, "
            "encoding.T and the pooling; if its library multiplies the input by 1 / tau, multiply v_threshold by "
            "tau",
            name,
        )
    return {"module": name, "weights_sha256": weights_sha256(weights), "alike": alike, "images": len(images)}


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 of weights in the order of their names; the names themselves are not hashed."""
    content = b"".join(tensor.cpu().contiguous().numpy().tobytes() for _, tensor in sorted(weights.items()))
    return hashlib.sha256(content).hexdigest()


def _alike(module: nn.Module, network: nn.Module, images: Images) -> float:
    """Return the share of images, in [0, 1], for which both predict the same class."""
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    same = 0
    try:
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                x = torch.from_numpy(images[start : start + BATCH].unit())
                same += int((module(x).argmax(1) == network(x.to(device)).argmax(1).cpu()).sum())
    except Exception as error:  # the module may raise any type
        raise InputError(f"the module does not take images {list(images.shape)}: {one_line(error)}") from error
    finally:
        network.train(was_training)
    return same / len(images)
