"""Run a network at another number of time steps T with the same weights: no weight of a LIF neuron belongs to a step.

Only the encoding, the readout's weights over time, and the per-step parameters of some defences depend on T. The
network of the first N steps uses the readout of these alone: the mean of their outputs, or the potential of a leaky
integrator after N steps.
"""

import copy

from torch import nn

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models.spiking_net import Shape, SpikingNet, frequency_radii, make_encoding, readout_weights
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.snn import LIF


def per_step_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters [T, ...] that hold a value for each step, as in `named_parameters`."""
    neurons = {path: module for path, module in model.named_modules() if isinstance(module, LIF)}
    return {f"{path}.{name}" for path, neuron in neurons.items() for name in neuron.per_step}


def set_time_steps(model: SpikingNet, recipe: Recipe, shape: Shape) -> None:
    """Set a model to encoding.T time steps of `recipe` in place; its weights do not change.

    Raises InputError for neurons that declare no per-step parameters but depend on the step, and for neurons with
    parameters for fewer than T steps.
    """
    T = recipe.encoding.T
    if model.T == T:
        return
    for layer in model.layers():
        neuron = layer.neuron
        parameters = [getattr(neuron, name) for name in neuron.per_step]
        if not (neuron.time_invariant or parameters) or any(len(values) < T for values in parameters):
            raise InputError(
                f"the neurons of {layer.name} have parameters for {model.T} time steps and cannot compute {T}"
            )
        for name, values in zip(neuron.per_step, parameters, strict=True):
            setattr(neuron, name, nn.Parameter(values.detach()[:T]))
    model.encode, model.T = make_encoding(recipe, shape), T
    model.readout.over_time = readout_weights(recipe).to(model.readout.over_time)


def first_steps(model: SpikingNet, recipe: Recipe, shape: Shape, steps: int) -> tuple[SpikingNet, Recipe]:
    """Return a network of the first `steps` of the model's T time steps, which shares its weights, and its recipe.

    Raises InputError for a number outside 1..T, for fewer steps of an encoding whose steps are frames of a recording,
    and as `set_time_steps` does.
    """
    encoding = recipe.encoding
    if not 1 <= steps <= encoding.T:
        raise InputError(f"this network has {encoding.T} time steps, so it cannot be cut to {steps}")
    if encoding.name == "frames" and steps < encoding.T:
        raise InputError(
            f"with encoding 'frames' each step sees a part of the recording, so the first {steps} of {encoding.T} "
            f"would not see its end; train with encoding.T and data.frames {steps}, which `train --init` can "
            "start from this network"
        )
    radii = frequency_radii(encoding, shape)[:steps] if encoding.name == "frequency" else encoding.radii
    recipe = recipe.model_copy(update={"encoding": encoding.model_copy(update={"T": steps, "radii": radii})})
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shortened = copy.deepcopy(model, shared)
    set_time_steps(shortened, recipe, shape)
    return shortened, recipe
