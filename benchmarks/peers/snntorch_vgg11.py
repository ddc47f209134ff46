"""VGG11 in snnTorch, which goes through the network once a step: reset to zero, leak 1/2, threshold 1."""

import snntorch
import torch
from peers import CLASSES, HIDDEN, PLAN, SHAPE


class Network(torch.nn.Module):
    """Images [B, 3, 32, 32] to logits [B, K], the mean of T outputs; `width` multiplies every layer's width."""

    def __init__(self, width: float, T: int) -> None:
        super().__init__()
        modules: list[torch.nn.Module] = []
        fan_in, size = SHAPE[0], SHAPE[1]
        for item in PLAN:
            if item == "P":
                modules.append(torch.nn.AvgPool2d(2))
                size //= 2
                continue
            fan_out = round(width * item)
            convolution = torch.nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
            modules += [convolution, torch.nn.BatchNorm2d(fan_out), spiking()]
            fan_in = fan_out
        modules.append(torch.nn.Flatten())
        fan_in *= size**2
        for item in HIDDEN:
            fan_out = round(width * item)
            modules += [torch.nn.Linear(fan_in, fan_out), spiking()]
            fan_in = fan_out
        self.body, self.T = torch.nn.ModuleList([*modules, torch.nn.Linear(fan_in, CLASSES)]), T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        membranes = {i: m.init_leaky() for i, m in enumerate(self.body) if isinstance(m, snntorch.Leaky)}
        outputs = []
        for _ in range(self.T):
            step = x
            for i, module in enumerate(self.body):
                if i in membranes:
                    step, membranes[i] = module(step, membranes[i])
                else:
                    step = module(step)
            outputs.append(step)
        return torch.stack(outputs).mean(0)


def spiking() -> snntorch.Leaky:
    """Its default surrogate, the derivative of atan."""
    return snntorch.Leaky(beta=0.5, threshold=1.0, reset_mechanism="zero")
