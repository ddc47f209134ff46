"""Exact simplifications of a trained network before it is written to ONNX."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import SpikingLayer


def fold_tdbn(model: SpikingNet) -> SpikingNet:
    """A copy in which each convolution has absorbed the tdBN behind it (running statistics, lambda alpha V_th, beta).

    The same function up to float rounding; `model` must be in eval mode and stays as it is.
    """
    folded = copy.deepcopy(model)
    for layer in folded.body:
        if isinstance(layer, SpikingLayer) and layer.norm is not None and isinstance(layer.synapse, nn.Conv2d):
            conv, norm = layer.synapse, layer.norm
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.scale, norm.bias
            )
            conv.weight, conv.bias, layer.norm = weight, bias, None
    return folded
