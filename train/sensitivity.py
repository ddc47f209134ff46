"""Robust, or only hard to differentiate? What a perturbation does to a network beside what its gradient promises.

margin        logit of the true class minus the best other, mean over the images the network gets right
promised      eps * |d margin / d x|_1: the drop an attacker expects who trusts the surrogate gradient
noise, pgd    the drop that really follows from U(-eps, eps) noise and from PGD in the recipe's setting
flipped       share of a layer's spikes that differ from those of the clean image, first to last layer

A defence that masks lowers `promised` alone; one that protects lowers `pgd / margin` and `flipped` too. Drops are given
in units of the network's own margin, since logit scales differ.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpdsgr_deploy.attacks import pgd, uniform
from mpdsgr_deploy.attacks.torch_target import input_gradient
from mpdsgr_deploy.bundle import WEIGHTS, Bundle
from mpdsgr_deploy.checkpoint import load_model
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.snn import Trace


def measure(bundle: Bundle, images: Images) -> dict[str, Any]:
    """All of the above on those of `images` that the network gets right, as JSON-ready numbers."""
    manifest = bundle.manifest
    attack, seed = manifest.recipe.attack, manifest.recipe.validation.seed
    model = load_model(bundle.file(WEIGHTS), manifest.recipe, manifest.input_shape, len(manifest.labels))
    x, y = torch.from_numpy(images.unit()), torch.from_numpy(images.classes)
    right = observe(model, x, y)[0] > 0
    x, y = x[right], y[right]
    noisy = torch.from_numpy(uniform(x.numpy(), eps=attack.eps, rng=np.random.default_rng(seed)))
    start = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 1
    attacked = pgd(
        lambda x, y: input_gradient(model, x, y),
        x,
        y,
        eps=attack.eps,
        step=attack.step,
        steps=attack.steps,
        draw=lambda _: start,
    )
    clean_margin, clean_spikes = observe(model, x, y)
    found = {"n": len(y), "eps": attack.eps, "margin": clean_margin.mean().item()}
    found["promised"] = attack.eps * margin_gradient(model, x, y).abs().sum((1, 2, 3)).mean().item()
    for name, perturbed in (("noise", noisy), ("pgd", attacked)):
        margin, spikes = observe(model, perturbed, y)
        found[name] = (clean_margin - margin).mean().item()
        found[f"flipped_{name}"] = {
            layer: (spikes[layer] != clean).float().mean().item() for layer, clean in clean_spikes.items()
        }
    return found


def observe(model: SpikingNet, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Margin [N] and each layer's spikes [T, N, ...] as booleans."""
    spikes: dict[str, Tensor] = {}

    def keep(trace: Trace) -> None:
        spikes[trace.layer] = torch.stack([state.spikes > 0 for state in trace.states])

    with torch.no_grad():
        return margin(model(x, keep), y), spikes


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class minus the best other [N]."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return true - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def margin_gradient(model: SpikingNet, x: Tensor, y: Tensor) -> Tensor:
    """d margin / d x through the training surrogate [N, C, H, W]."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(margin(model(x), y).sum(), x)[0]
