"""Exact simplifications of a trained network before it is written to ONNX."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import TdBN


def fold_tdbn(model: SpikingNet) -> SpikingNet:
    """A copy in which each convolution has absorbed the (td)BN behind it: running statistics, scale and shift.

    The same function up to float rounding; `model` must be in eval mode and stays as it is.
    """
    folded = copy.deepcopy(model)
    for layer in folded.layers():
        conv, norm = layer.synapse, layer.norm
        if isinstance(conv, nn.Conv2d) and isinstance(norm, TdBN | nn.BatchNorm2d):
            assert norm.running_mean is not None  # for the type checker: both kinds keep running statistics
            assert norm.running_var is not None
            scale = norm.scale if isinstance(norm, TdBN) else norm.weight
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, scale, norm.bias
            )
            conv.weight, conv.bias, layer.norm = weight, bias, None
    return folded
