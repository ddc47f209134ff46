"""VGG11 in SpikingJelly, multi-step: hard reset, leak 1/2 of the potential, threshold 1, the mean of T outputs."""

import torch
from peers import CLASSES, HIDDEN, PLAN, SHAPE
from spikingjelly.activation_based import functional, layer, neuron


class Network(torch.nn.Module):
    """Images [B, 3, 32, 32] to logits [B, K]; `width` multiplies every layer's width.

    plan: channels of the convolutions, P halves the map; hidden: the fully connected layers.
    """

    def __init__(
        self, width: float, T: int, plan: tuple[int | str, ...] = PLAN, hidden: tuple[int, ...] = HIDDEN
    ) -> None:
        super().__init__()
        modules: list[torch.nn.Module] = []
        fan_in, size = SHAPE[0], SHAPE[1]
        for item in plan:
            if item == "P":
                modules.append(layer.AvgPool2d(2, step_mode="m"))
                size //= 2
                continue
            fan_out = round(width * item)
            convolution = layer.Conv2d(fan_in, fan_out, 3, padding=1, bias=False, step_mode="m")
            modules += [convolution, layer.BatchNorm2d(fan_out, step_mode="m"), spiking()]
            fan_in = fan_out
        modules.append(layer.Flatten(step_mode="m"))
        fan_in *= size**2
        for item in hidden:
            fan_out = round(width * item)
            modules += [layer.Linear(fan_in, fan_out, step_mode="m"), spiking()]
            fan_in = fan_out
        self.body, self.T = torch.nn.Sequential(*modules, layer.Linear(fan_in, CLASSES, step_mode="m")), T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functional.reset_net(self.body)
        return self.body(x.repeat(self.T, 1, 1, 1, 1)).mean(0)


def spiking() -> neuron.LIFNode:
    """u = u/2 (1 - spike) + current: SpikingJelly's tau is 1 / (1 - leak). It chooses its kernels by the device."""
    return neuron.LIFNode(tau=2.0, decay_input=False, v_threshold=1.0, v_reset=0.0, step_mode="m")
