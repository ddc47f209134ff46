"""Spiking wide residual networks (Zagoruyko & Komodakis, arXiv 1605.07146), as the SNN-RAT family builds them."""

from functools import partial

import torch
from torch import Tensor, nn

from mpdsgr_deploy.models.spiking_net import (
    Shape,
    SpikingNet,
    make_encoding,
    make_neuron,
    make_norm,
    make_readout,
    register,
    scaled,
)
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import Noise, Observer, SpikingLayer, Temporal, fold_time

STEM = 16  # channels of the first convolution
GROUPS = ((64, 1), (128, 2), (256, 2))  # channels and stride of each group of blocks
BLOCKS = 2  # blocks per group


class ConvexCombination(nn.Module):
    """w_0 a + w_1 b of two tensors of the same shape, with learned weights [2] that start at one half.

    Only `project` keeps the weights convex; a defence may call it after each training step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.weight[0] * a + self.weight[1] * b

    @torch.no_grad()
    def project(self) -> None:
        """Move the weights in place to the nearest point of the simplex w_0 + w_1 = 1, w >= 0.

        In two dimensions that is the foot of the perpendicular on the line, clamped to the segment's ends.
        """
        first = ((self.weight[0] - self.weight[1] + 1) / 2).clamp(0, 1)
        self.weight.copy_(torch.stack([first, 1 - first]))


class WideBlock(Temporal):
    """Norm, LIF and 3x3 convolution, twice, and a shortcut: [T, B, C, H, W] to [T, B, C', H / stride, W / stride].

    The shortcut is the input itself or, if the shape changes, a 1x1 convolution of the first layer's spikes.
    """

    def __init__(self, recipe: Recipe, name: str, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, bias=recipe.model.norm == "none")
        norms = make_norm(recipe, fan_in), make_norm(recipe, fan_out)
        reduce = conv(fan_in, fan_out, 3, stride=stride, padding=1)
        self.first = SpikingLayer(f"{name}_1", nn.Identity(), norms[0], make_neuron(recipe))
        self.second = SpikingLayer(f"{name}_2", reduce, norms[1], make_neuron(recipe))
        self.conv = conv(fan_out, fan_out, 3, padding=1)
        same = fan_in == fan_out and stride == 1
        self.shortcut = None if same else conv(fan_in, fan_out, 1, stride=stride)
        self.combine = ConvexCombination()

    def forward(self, x: Tensor, observe: Observer | None = None, noise: Noise = None) -> Tensor:
        spikes = self.first(x, observe, noise)
        residual = fold_time(self.conv, self.second(spikes, observe, noise))
        return self.combine(x if self.shortcut is None else fold_time(self.shortcut, spikes), residual)


@register("wrn16-4")
def wrn16_4(recipe: Recipe, shape: Shape, classes: int) -> SpikingNet:
    """WRN16-4 for images of any size: 13 layers of neurons, 2.75 M parameters at K = 10.

    The last feature map, 8x8 for 32x32 images, is averaged to one value per channel. `model.width` of the recipe
    multiplies every width.
    """
    encode = make_encoding(recipe, shape)
    fan_in = scaled(STEM, recipe)
    body: list[nn.Module] = [nn.Conv2d(encode.channels, fan_in, 3, padding=1, bias=recipe.model.norm == "none")]
    for channels, group_stride in GROUPS:
        fan_out = scaled(channels, recipe)
        for stride in (group_stride, *[1] * (BLOCKS - 1)):
            body.append(WideBlock(recipe, f"block{len(body)}", fan_in, fan_out, stride))
            fan_in = fan_out
    body.append(SpikingLayer("last", nn.Identity(), make_norm(recipe, fan_in), make_neuron(recipe)))
    body += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return SpikingNet(shape, encode=encode, body=body, readout=make_readout(recipe, fan_in, classes))
