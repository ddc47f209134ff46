"""Explain a network's robustness: its response to growing perturbations, and the factors of its surrogate gradient.

`sensitivity.py` defines what is measured under perturbations. The factors are those of the bound on the surrogate
gradient in MPD-SGR (arXiv 2511.12199), measured for each layer such that their product estimates the gradient:

    leak         sum of tau^k over T steps, the weight of all currents together in the last potential, without resets
    weights      largest singular value of the map from the layer's input to its current, with normalisation
    surrogate    root mean square of the surrogate's derivative over images, neurons and steps

The factor of the weights is a product of three, because a normalised layer amplifies weak input:

    scale        root mean square of tdBN's factor on the normalised current; 1 without tdBN
    density      1 / deviation of the layer's input over images, space and steps (root mean square over channels); the
                 sparser the spikes, the smaller their deviation, and the more tdBN amplifies them
    filter       weights / (scale * density), the largest gain of the filters themselves
"""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import BaseModel
from torch import Tensor

from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.experiments.record_files import Rounded, put_record
from mpdsgr_deploy.experiments.records import KEY
from mpdsgr_deploy.experiments.sensitivity import sensitivity
from mpdsgr_deploy.experiments.table_run import CHECKPOINT, Run, trained
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.mpd import leak_sum
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import SpikingLayer, TdBN, Trace
from mpdsgr_deploy.trained_networks import load_network

RECORDS = "why.jsonl"
SIZES = (0.125, 0.25, 0.5, 1.0, 2.0)  # as multiples of the recipe's eps
ITERATIONS = 200  # iterations of the power method


class LayerFactors(BaseModel):
    """The factors of one layer, as the module defines them. firing_rate: spikes per neuron and step."""

    layer: str
    leak: float
    weights: float
    surrogate: float
    scale: float
    density: float
    firing_rate: float

    @property
    def filter(self) -> float:
        """The part of the weights' factor that is neither scale nor density."""
        return self.weights / (self.scale * self.density)


class Explained(BaseModel):
    """The record of one network. sizes: the result of `sensitivity` for each eps. layers: the factors of the layers.

    images: a phrase that names the images. checkpoint: which one of the run was measured, "last" or "best".
    """

    schema_version: int = 1
    row: str
    seed: int
    checkpoint: str
    images: str
    sizes: Annotated[list[dict[str, Any]], Rounded]
    layers: Annotated[list[LayerFactors], Rounded]
    provenance: dict[str, Any]


def explain(row: str, model: SpikingNet, images: Images, recipe: Recipe, checkpoint: str) -> Explained:
    """Measure a network in eval mode on images. recipe: states eps, which SIZES multiply, and the steps of PGD."""
    sizes = []
    for eps in (size * recipe.attack.eps for size in SIZES):
        attack = recipe.attack.model_copy(update={"eps": eps, "step": eps / 4, "steps": recipe.attack.strong_steps})
        sizes.append(sensitivity(model, images, recipe.model_copy(update={"attack": attack})))
    return Explained(
        row=row,
        seed=recipe.training.seed,
        checkpoint=checkpoint,
        images=name_sample(len(images), recipe.data.name),
        sizes=sizes,
        layers=factors(model, images),
        provenance=provenance(),
    )


def explain_runs(runs: Iterable[Run], images: int) -> None:
    """Explain networks on the first `images` test images, and write a record of each into its table's folder.

    Networks that are missing are trained first.
    """
    for run in runs:
        log.info("explaining %s", run)
        _, model = load_network(trained(run))
        test = load_test(run.local_recipe.data)[:images]
        put_record(run.folder / RECORDS, explain(run.row, model, test, run.recipe, CHECKPOINT), KEY)


def factors(model: SpikingNet, images: Images) -> list[LayerFactors]:
    """Measure the factors of every layer, in the order of the forward pass."""
    inputs: dict[str, Tensor] = {}
    measured: dict[str, dict[str, float]] = {}

    def observe(trace: Trace) -> None:
        v = torch.stack([u for u, _ in trace.states]) - trace.neuron.v_threshold
        rate = torch.stack([spikes for _, spikes in trace.states]).mean()
        rms = trace.neuron.surrogate.derivative(v).square().mean().sqrt()
        leak = leak_sum(trace.neuron.tau, len(trace.states))[-1].item()
        measured[trace.layer] = {"leak": leak, "surrogate": rms.item(), "firing_rate": rate.item()}

    def remember(layer: SpikingLayer) -> Any:
        return layer.synapse.register_forward_pre_hook(lambda _, x: inputs.update({layer.name: x[0]}))

    hooks = [remember(layer) for layer in model.layers()]
    with torch.no_grad():
        model(torch.from_numpy(images.unit()), observe, torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    layers = []
    for layer in model.layers():
        x = inputs[layer.name]
        weights = largest_gain(layer, tuple(x.shape[1:]))
        scale = layer.norm.scale.square().mean().sqrt().item() if isinstance(layer.norm, TdBN) else 1.0
        variance = x.transpose(0, 1).flatten(1).var(1, correction=0).mean()
        density = variance.clamp(min=1e-12).rsqrt().item()
        layers.append(
            LayerFactors(layer=layer.name, weights=weights, scale=scale, density=density, **measured[layer.name])
        )
    return layers


def largest_gain(layer: SpikingLayer, shape: tuple[int, ...]) -> float:
    """Return the largest singular value of a layer's affine map from input to current, by power iteration on A^T A."""
    v = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    offset = layer.current(torch.zeros(1, *shape)).detach()
    for _ in range(ITERATIONS):
        (product,) = torch.autograd.grad((layer.current(v) - offset).square().sum() / 2, v)  # A^T A v
        gain = product.norm() / v.detach().norm()
        v = (product / product.norm()).detach().requires_grad_()
    return float(gain.sqrt())
