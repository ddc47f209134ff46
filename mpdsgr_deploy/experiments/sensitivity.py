"""Compare the effect of perturbations with what the gradient predicts, to tell robustness from gradient masking.

    margin        logit of the true class minus the largest other logit, mean over the images that are classified right
    promised      eps * |d margin / d x|_1, the drop of the margin that the surrogate gradient predicts
    noise, pgd    the measured drop under U(-eps, eps) noise and under PGD in the recipe's setting
    flipped       share of a layer's spikes that differ from those for the clean image

Gradient masking lowers `promised` alone. A defence that protects also lowers `pgd` / `margin` and `flipped`; drops are
compared in units of the margin, because networks differ in the scale of their logits. A stochastic network draws the
same noise for the clean and the perturbed image, so that they differ in the perturbation alone.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpdsgr_deploy.attacks import pgd, uniform
from mpdsgr_deploy.attacks.torch_target import input_gradient, margin
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.runtime.torch_model import exact_convolutions
from mpdsgr_deploy.snn import Observer, Trace


class FixedNoise:
    """A network in eval mode that draws the same noise in every forward pass."""

    def __init__(self, model: SpikingNet, seed: int) -> None:
        self.model, self.seed = model, seed

    def __call__(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        with exact_convolutions():  # rounded products would flip further spikes
            return self.model(x, observe, torch.Generator().manual_seed(self.seed))

    def observe(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the margins [N] for images x of classes y, and the spikes [T, N, ...] by layer as booleans."""
        spikes: dict[str, Tensor] = {}

        def keep(trace: Trace) -> None:
            spikes[trace.layer] = torch.stack([state.spikes > 0 for state in trace.states])

        with torch.no_grad():
            return -margin(self(x, keep), y), spikes

    def margin_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Return d margin / d x [N, C, H, W] through the training surrogate."""
        x = x.clone().requires_grad_()
        return torch.autograd.grad(-margin(self(x), y).sum(), x)[0]


def sensitivity(model: SpikingNet, images: Images, recipe: Recipe) -> dict[str, Any]:
    """Return the means that the module defines, over the images that a model in eval mode classifies correctly.

    The result is JSON-ready: n (the number of these images), eps, margin, promised, noise, pgd, and flipped_noise and
    flipped_pgd by layer. For n = 0 there are no means.
    """
    attack, seed = recipe.attack, recipe.validation.seed
    device = next(model.parameters()).device
    probe = FixedNoise(model, seed)
    clean = images.unit()
    noisy = uniform(clean, eps=attack.eps, rng=np.random.default_rng(seed))
    start = 2 * torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed)) - 1
    sums: dict[tuple[str, str | None], float] = defaultdict(float)
    for index in torch.arange(len(images)).split(recipe.validation.batch_size):
        x, noise = (torch.from_numpy(array)[index].to(device) for array in (clean, noisy))
        y, batch_start = torch.from_numpy(images.classes)[index].to(device), start[index].to(device)
        for key, value in batch_sums(probe, x, y, noise, batch_start, recipe).items():
            sums[key] += value
    n = int(sums.pop(("n", None), 0))
    means: dict[str, Any] = {"n": n, "eps": attack.eps, "flipped_noise": {}, "flipped_pgd": {}}
    for (kind, layer), total in sums.items() if n else ():
        if layer is None:
            means[kind] = total / n
        else:
            means[kind][layer] = total / n
    return means


def batch_sums(
    probe: FixedNoise, x: Tensor, y: Tensor, noisy: Tensor, start: Tensor, recipe: Recipe
) -> dict[tuple[str, str | None], float]:
    """Return the sums over a batch's correctly classified images that `sensitivity` averages, by name and layer.

    x, noisy: clean and noisy images [B, C, H, W] of classes y [B]; start: the random start of PGD in units of eps. The
    layer is None for values of the whole network. All images of the batch pass through the network each time, because
    an image's noise depends on its place in the batch. The attack draws other noise.
    """
    attack = recipe.attack
    noise = torch.Generator().manual_seed(probe.seed + 1)

    def target(x: Tensor, y: Tensor) -> Any:
        with exact_convolutions():
            return input_gradient(lambda x: probe.model(x, None, noise), x, y)

    attacked = pgd(target, x, y, eps=attack.eps, step=attack.step, steps=attack.steps, draw=lambda _: start)
    clean_margin, clean_spikes = probe.observe(x, y)
    right = clean_margin > 0
    promised = attack.eps * probe.margin_gradient(x, y).abs().sum((1, 2, 3))
    n = int(right.sum())
    whole = {"n": float(n), "margin": clean_margin[right].sum().item(), "promised": promised[right].sum().item()}
    sums: dict[tuple[str, str | None], float] = {(name, None): total for name, total in whole.items()}
    for name, perturbed in (("noise", noisy), ("pgd", attacked)):
        after, spikes = probe.observe(perturbed, y)
        sums[name, None] = (clean_margin - after)[right].sum().item()
        for layer, clean in clean_spikes.items() if n else ():
            sums[f"flipped_{name}", layer] = (spikes[layer] != clean)[:, right].float().mean().item() * n
    return sums
