"""What makes a network robust or not: perturbations of growing size, and the factors of its surrogate gradient.

A network meets random and adversarial steps of growing size; `sensitivity.py` says what is compared. And for each layer
the factors that MPD-SGR (arXiv 2511.12199) bounds the surrogate gradient with, measured so that their product is an
estimate of it and no bound:

leak        sum of tau^k over T steps: what a potential remembers of its currents, without resets
weights     largest singular value of the map from the layer's input to its current, normalisation included
surrogate   root mean square of the surrogate's derivative over images, neurons and steps

The weights' factor is a product of three again, since a normalised layer gains what its input lacks:

scale       root mean square of what tdBN multiplies a normalised current with; 1 without normalisation
density     1 / the deviation of the layer's input over images, space and steps, root mean square over channels:
            the sparser spikes are, the smaller their deviation and the more tdBN multiplies them with
filter      the rest: the largest gain from an input to a current of deviation one
"""

from typing import Any

import torch
from pydantic import BaseModel
from sensitivity import sensitivity
from torch import Tensor

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.mpd import leak_sum
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import SpikingLayer, TdBN, Trace

SIZES = (0.125, 0.25, 0.5, 1.0, 2.0)  # times the recipe's eps
ITERATIONS = 200  # of the power method


class Layer(BaseModel):
    """Factors of one layer; see above. firing_rate: spikes a neuron and step."""

    layer: str
    leak: float
    weights: float
    surrogate: float
    scale: float
    density: float
    firing_rate: float

    @property
    def filter(self) -> float:
        """What of the weights' factor is neither scale nor density."""
        return self.weights / (self.scale * self.density)


class Explained(BaseModel):
    """One network: `sizes` as `sensitivity` gives them, one an eps, and the factors of its layers."""

    row: str
    seed: int
    sizes: list[dict[str, Any]]
    layers: list[Layer]


class Why(BaseModel):
    """The file that the page is rendered from."""

    images: str
    networks: list[Explained]
    provenance: dict[str, Any]


def explain(row: str, model: SpikingNet, images: Images, recipe: Recipe) -> Explained:
    """All of the above for one network in eval mode."""
    sizes = []
    for size in SIZES:
        eps = size * recipe.attack.eps
        steps = {"eps": eps, "step": eps / 4, "steps": recipe.attack.strong_steps}
        sizes.append(
            sensitivity(model, images, recipe.model_copy(update={"attack": recipe.attack.model_copy(update=steps)}))
        )
    return Explained(row=row, seed=recipe.training.seed, sizes=sizes, layers=factors(model, images))


def factors(model: SpikingNet, images: Images) -> list[Layer]:
    """Of every layer, in the order of the forward pass."""
    inputs: dict[str, Tensor] = {}
    seen: dict[str, tuple[float, float, float]] = {}

    def observe(trace: Trace) -> None:
        v = torch.stack([u for u, _ in trace.states]) - trace.neuron.v_threshold
        rate = torch.stack([spikes for _, spikes in trace.states]).mean()
        rms = trace.neuron.surrogate.derivative(v).square().mean().sqrt()
        seen[trace.layer] = (leak_sum(trace.neuron.tau, len(trace.states))[-1].item(), rms.item(), rate.item())

    def remember(layer: SpikingLayer) -> Any:
        return layer.synapse.register_forward_pre_hook(lambda _, x: inputs.update({layer.name: x[0]}))

    hooks = [remember(layer) for layer in model.layers()]
    with torch.no_grad():
        model(torch.from_numpy(images.unit()), observe, torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    return [
        Layer(
            layer=layer.name,
            leak=seen[layer.name][0],
            weights=largest_gain(layer, tuple(inputs[layer.name].shape[1:])),
            surrogate=seen[layer.name][1],
            scale=layer.norm.scale.square().mean().sqrt().item() if isinstance(layer.norm, TdBN) else 1.0,
            density=inputs[layer.name]
            .transpose(0, 1)
            .flatten(1)
            .var(1, correction=0)
            .mean()
            .clamp(min=1e-12)
            .rsqrt()
            .item(),
            firing_rate=seen[layer.name][2],
        )
        for layer in model.layers()
    ]


def largest_gain(layer: SpikingLayer, shape: tuple[int, ...]) -> float:
    """The largest singular value of a layer's affine map from input to current, by the power method on A^T A."""
    v = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    offset = layer.current(torch.zeros(1, *shape)).detach()
    for _ in range(ITERATIONS):
        (moved,) = torch.autograd.grad((layer.current(v) - offset).square().sum() / 2, v)  # A^T A v
        gain = moved.norm() / v.detach().norm()
        v = (moved / moved.norm()).detach().requires_grad_()
    return float(gain.sqrt())
