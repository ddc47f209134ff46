"""The attack is led astray by what the evaluation itself computes, so that a network that is not robust seems so."""

from collections.abc import Callable

import numpy as np

from faults.planted import Array, Planted, fault
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.protocols import Gradient, State

ATTACKED = tuple(f"verdict/{name}" for name in ("bim", "pgd", "strong", "mpd-apgd", "square", "worst"))


def mislead(copy: Planted, how: Callable[[Array], Array]) -> None:
    """Let the evaluation's own gradients be what `how` makes of the true ones."""
    true = GraphAttacker.step

    def step(self: GraphAttacker, x: Array, y: Array, state: State) -> tuple[Gradient, State]:
        found, moved = true(self, x, y, state)
        return found._replace(gradient=how(found.gradient)), moved

    copy.patch.setattr(GraphAttacker, "step", step)


@fault("evaluation", 3, "check 7")
def gradients_of_zero(copy: Planted) -> None:
    """Spikes differentiated as the steps they are."""
    mislead(copy, np.zeros_like)


@fault("evaluation", 2, "pixels must be finite")
def gradients_not_finite(copy: Planted) -> None:
    """A loss that overflows."""
    mislead(copy, lambda gradient: gradient * np.float32(np.nan))


@fault("evaluation", 3, "check 3")
def gradients_of_chance(copy: Planted) -> None:
    """Noise in place of the gradient: every white-box attack is a random walk."""
    draw = np.random.default_rng(0)
    mislead(copy, lambda gradient: draw.standard_normal(gradient.shape, np.float32))


@fault("evaluation", 3, "check 3", thorough=True)
def gradients_downhill(copy: Planted) -> None:
    """The wrong sign: attacks make images easier."""
    mislead(copy, np.negative)


@fault("evaluation", 3, "check 18")
def gradients_of_chance_for_some_images(copy: Planted) -> None:
    """A decoy that leads astray where an image is dark: every other image seems robust."""
    draw = np.random.default_rng(0)

    def astray(gradient: Array) -> Array:
        noise = draw.standard_normal(gradient.shape, np.float32)
        weak = np.abs(gradient).mean((1, 2, 3)) < np.median(np.abs(gradient).mean((1, 2, 3))) * 1.2
        return np.where(weak[:, None, None, None], noise, gradient)

    mislead(copy, astray)


@fault("evaluation", 3, "check 13")
def gradients_of_half_the_image(copy: Planted) -> None:
    """A slice too few in the backward pass: the attack sees the upper half only."""

    def upper(gradient: Array) -> Array:
        gradient = gradient.copy()
        gradient[:, :, gradient.shape[2] // 2 :] = 0
        return gradient

    mislead(copy, upper)


@fault("evaluation", 3, "check 7", kind="noisy", thorough=True)
def gradients_of_zero_behind_averaged_draws(copy: Planted) -> None:
    """Of a network that draws noise: one image in ten has no gradient in any draw, and each draw counts."""

    def nothing(gradient: Array) -> Array:
        vanishes = np.arange(len(gradient)) % 10 == 0
        return np.where(vanishes[:, None, None, None], np.float32(0), gradient)

    mislead(copy, nothing)


@fault("evaluation", 3, "check 7", kind="sharp", thorough=True)
def surrogate_too_sharp(copy: Planted) -> None:
    """A network trained, attacked and promised through a surrogate so narrow that hardly any gradient passes."""


@fault("artefact", 1, "newly wrong", kind="wide", thorough=True)
def promise_through_the_trained_surrogate_alone(copy: Planted) -> None:
    """Trained almost straight-through; whoever promised attacked through that surrogate and called it a day."""
    reference = copy.arrays("reference.npz")
    own = reference["verdict/fgsm"]
    copy.write("reference.npz", {k: own if k.startswith(ATTACKED) else v for k, v in reference.items()})
