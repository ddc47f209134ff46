"""Random numbers for stochastic networks, from an explicit source.

The source is a torch generator, None for torch's global generator, or a function. A generator draws on the CPU and the
numbers are moved to the device, so a seed gives the same spikes on every device. A function returns draws that were
made elsewhere; this is how an exported network gets its noise.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mpdsgr_deploy.errors import InputError

Kind = Literal["uniform", "normal"]
Draw = Callable[[Kind, int, Tensor], Tensor]  # arguments (kind, steps, x); returns a draw [steps, *x.shape]
Noise = torch.Generator | Draw | None


def uniform(steps: int, x: Tensor, noise: Noise) -> Tensor:
    """Return independent draws of U[0, 1), [steps, *x.shape], on x's device and in its dtype."""
    if callable(noise):
        return noise("uniform", steps, x)
    return torch.rand((steps, *x.shape), generator=noise, device="cpu").to(x)


def normal(steps: int, x: Tensor, noise: Noise) -> Tensor:
    """Return independent draws of N(0, 1), [steps, *x.shape], on x's device and in its dtype."""
    if callable(noise):
        return noise("normal", steps, x)
    return torch.randn((steps, *x.shape), generator=noise, device="cpu").to(x)


def repeatable(noise: Noise) -> tuple[Noise, Callable[[], Noise]]:
    """Return a noise source to draw from, and a function that returns a source which repeats these draws.

    For None, both are None: the caller has to reset torch's global generator.
    """
    if noise is None:
        return None, lambda: None
    if isinstance(noise, torch.Generator):
        state = noise.get_state()
        return noise, lambda: torch.Generator().set_state(state)
    recorded: list[Tensor] = []

    def record(kind: Kind, steps: int, x: Tensor) -> Tensor:
        recorded.append(noise(kind, steps, x))
        return recorded[-1]

    def again() -> Noise:
        remaining = iter(recorded)
        return lambda kind, steps, x: next(remaining)

    return record, again


def in_turn(draws: Sequence[Tensor]) -> Draw:
    """Return a function that yields `draws`, each [B, steps, ...], in the order in which a forward pass requests them.

    The batch is the first axis, as in exported networks. The function raises InputError if a network requests more
    draws than there are.
    """
    remaining = iter(draws)

    def draw(kind: Kind, steps: int, x: Tensor) -> Tensor:
        tensor = next(remaining, None)
        if tensor is None:
            raise InputError(f"the network draws noise more often than {len(draws)} times; give one tensor per draw")
        return tensor.transpose(0, 1).to(x)

    return draw
