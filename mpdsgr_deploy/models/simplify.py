"""Simplifications of a network in eval mode, for export and attack: the same function up to float rounding.

Each pass changes a network in place; `simplify` applies passes to a copy. Folding time into the batch for stateless
layers needs no pass, because `SpikingNet` computes that way.
"""

import copy
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mpdsgr_deploy.models.spiking_net import Readout, SpikingNet
from mpdsgr_deploy.snn import Encoding, Noise, TdBN
from mpdsgr_deploy.snn.encoding import Direct, Normalize

Pass = Callable[[SpikingNet], None]


def fold_norm(model: SpikingNet) -> None:
    """Fold the running statistics, scale and shift of each (td)BN into the convolution before it."""
    for layer in model.layers():
        conv, norm = layer.synapse, layer.norm
        if isinstance(conv, nn.Conv2d) and isinstance(norm, TdBN | nn.BatchNorm2d):
            assert norm.running_mean is not None  # for the type checker: both kinds keep running statistics
            assert norm.running_var is not None
            scale = norm.scale if isinstance(norm, TdBN) else norm.weight
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, scale, norm.bias
            )
            conv.weight, conv.bias, layer.norm = weight, bias, None


class Once(Encoding):
    """An encoding that gives the normalised images of the first step alone: [B, C, H, W] to [1, B, C, H, W]."""

    def forward(self, x: Tensor, normalize: Normalize, noise: Noise = None) -> Tensor:
        return normalize(x).unsqueeze(0)


def encode_once(model: SpikingNet) -> None:
    """With direct coding, compute everything before the first neurons once instead of at T equal steps."""
    if isinstance(model.encode, Direct):
        model.encode = Once(model.T, model.encode.channels)
        model.layers()[0].neuron.hold = model.T


class SumFirst(Readout):
    """A readout with the same logits from a single product: W (sum_t a_t s_t) + b sum_t a_t.

    `Readout` computes sum_t a_t (W s_t + b), where a = `over_time` and s_t are the spikes at step t.
    """

    def __init__(self, readout: Readout) -> None:
        super().__init__(readout.over_time, readout.in_features, readout.out_features)
        self.weight, self.bias = readout.weight, nn.Parameter(readout.bias * readout.over_time.sum())

    def forward(self, steps: Tensor) -> Tensor:
        return F.linear((self.over_time[:, None, None] * steps).sum(0), self.weight, self.bias)


def sum_before_readout(model: SpikingNet) -> None:
    """Apply the last linear layer to the weighted sum of the spikes over T steps instead of to each step."""
    model.readout = SumFirst(model.readout)


PASSES: tuple[Pass, ...] = (fold_norm, encode_once, sum_before_readout)


def simplify(model: SpikingNet, passes: Sequence[Pass] = PASSES) -> SpikingNet:
    """Return a copy of `model`, which must be in eval mode, after `passes`. The two share unchanged weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    simplified = copy.deepcopy(model, shared)
    for simplification in passes:
        simplification(simplified)
    return simplified
