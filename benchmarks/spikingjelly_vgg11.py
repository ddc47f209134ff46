"""VGG11 in SpikingJelly, eagerly, for benchmarks/inference.py: reads a batch size a line, answers seconds.

Runs in an environment of its own, with torch but without mpdsgr-deploy. The same layers and the same neuron: hard
reset, leak 1/2 of the potential, threshold 1, T steps of the same image, the mean of the last layer's outputs.
"""

import sys
import time

import torch
from spikingjelly.activation_based import functional, layer, neuron

PLAN = (64, "P", 128, 256, "P", 512, 512, 512, "P", 512, 512)


def vgg11(width: float, classes: int = 10) -> torch.nn.Sequential:
    """The network for 32x32 images, multi-step, untrained; `width` multiplies every layer's width."""
    modules: list[torch.nn.Module] = []
    fan_in = 3
    for item in PLAN:
        if isinstance(item, str):
            modules.append(layer.AvgPool2d(2, step_mode="m"))
            continue
        fan_out = round(width * item)
        convolution = layer.Conv2d(fan_in, fan_out, 3, padding=1, bias=False, step_mode="m")
        modules += [convolution, layer.BatchNorm2d(fan_out, step_mode="m"), spiking()]
        fan_in = fan_out
    modules.append(layer.Flatten(step_mode="m"))
    fan_in *= 4 * 4
    for item in (4096, 4096):
        fan_out = round(width * item)
        modules += [layer.Linear(fan_in, fan_out, step_mode="m"), spiking()]
        fan_in = fan_out
    return torch.nn.Sequential(*modules, layer.Linear(fan_in, classes, step_mode="m"))


def spiking() -> neuron.LIFNode:
    """u = u/2 (1 - spike) + current: SpikingJelly's tau is 1 / (1 - leak)."""
    return neuron.LIFNode(tau=2.0, decay_input=False, v_threshold=1.0, v_reset=0.0, step_mode="m")


def main(width: float, T: int, threads: int) -> None:
    """Answer until the input ends; each batch size is warmed up when it first comes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = vgg11(width).train()
    images: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        model(torch.rand(16, 3, 32, 32).repeat(T, 1, 1, 1, 1))  # statistics of the normalisation, so that neurons fire
        functional.reset_net(model)
        model.eval()
        print("ready", flush=True)
        for line in sys.stdin:
            batch = int(line)
            if batch not in images:
                images[batch] = torch.rand(batch, 3, 32, 32)
                infer(model, images[batch], T)
            started = time.perf_counter()
            infer(model, images[batch], T)
            print(time.perf_counter() - started, flush=True)


def infer(model: torch.nn.Module, x: torch.Tensor, T: int) -> torch.Tensor:
    """Logits [B, K] of images [B, 3, 32, 32]."""
    logits = model(x.repeat(T, 1, 1, 1, 1)).mean(0)
    functional.reset_net(model)
    return logits


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
