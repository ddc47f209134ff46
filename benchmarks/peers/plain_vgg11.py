"""VGG11 in plain torch, as one would write it first: a loop over steps in each layer, autograd does the rest."""

import torch
from peers import CLASSES, HIDDEN, PLAN, SHAPE


class Spike(torch.autograd.Function):
    """[v >= 0], with the triangle max(0, 1 - |v|) for its derivative."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


class Neurons(torch.nn.Module):
    """LIF on [T, B, ...]: hard reset, leak 1/2, threshold 1."""

    def forward(self, current: torch.Tensor) -> torch.Tensor:
        u, spikes = torch.zeros_like(current[0]), []
        for step in current:
            u = u / 2 + step
            spikes.append(Spike.apply(u - 1))
            u = u * (1 - spikes[-1])
        return torch.stack(spikes)


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
            modules += [torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(fan_out)), Neurons()]
            fan_in = fan_out
        modules.append(torch.nn.Flatten())
        fan_in *= size**2
        for item in HIDDEN:
            fan_out = round(width * item)
            modules += [torch.nn.Linear(fan_in, fan_out), Neurons()]
            fan_in = fan_out
        self.body, self.T = torch.nn.ModuleList([*modules, torch.nn.Linear(fan_in, CLASSES)]), T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = x.repeat(self.T, 1, 1, 1, 1)
        for module in self.body:
            if isinstance(module, Neurons):
                steps = module(steps)
            else:
                steps = module(steps.flatten(0, 1)).unflatten(0, (self.T, -1))
        return steps.mean(0)
