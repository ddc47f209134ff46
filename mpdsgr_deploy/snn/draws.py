"""Random numbers for stochastic networks, from an explicit source.

A generator draws them on the CPU, from where they are moved, so a seed gives the same spikes on every device. None
stands for torch's global generator, as in torch itself. A function in its place answers every request itself: with
draws made elsewhere, which is how an exported network gets its noise.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mpdsgr_deploy.errors import InputError

Kind = Literal["uniform", "normal"]
Draw = Callable[[Kind, int, Tensor], Tensor]  # the request (kind, steps, x) to a draw [steps, *x.shape]
Noise = torch.Generator | Draw | None


def uniform(steps: int, x: Tensor, noise: Noise) -> Tensor:
    """Draw U[0, 1) of shape [steps, *x.shape], on x's device and in its dtype; fresh for every step."""
    if callable(noise):
        return noise("uniform", steps, x)
    return torch.rand((steps, *x.shape), generator=noise, device="cpu").to(x)


def normal(steps: int, x: Tensor, noise: Noise) -> Tensor:
    """Draw N(0, 1) of shape [steps, *x.shape], on x's device and in its dtype; fresh for every step."""
    if callable(noise):
        return noise("normal", steps, x)
    return torch.randn((steps, *x.shape), generator=noise, device="cpu").to(x)


def repeatable(noise: Noise) -> tuple[Noise, Callable[[], Noise]]:
    """The noise to draw from, and a function whose result repeats these draws from the first one.

    For None it returns None: the caller has to rewind torch's global generator.
    """
    if noise is None:
        return None, lambda: None
    if isinstance(noise, torch.Generator):
        state = noise.get_state()
        return noise, lambda: torch.Generator().set_state(state)
    made: list[Tensor] = []

    def drawing(kind: Kind, steps: int, x: Tensor) -> Tensor:
        made.append(noise(kind, steps, x))
        return made[-1]

    def again() -> Noise:
        left = iter(made)
        return lambda kind, steps, x: next(left)

    return drawing, again


def in_turn(draws: Sequence[Tensor]) -> Draw:
    """Hands out `draws`, each [B, steps, ...], in the order in which one forward pass asks for them.

    The batch is the first axis, as in exported networks. Raises InputError if more draws are asked for.
    """
    remaining = iter(draws)

    def draw(kind: Kind, steps: int, x: Tensor) -> Tensor:
        tensor = next(remaining, None)
        if tensor is None:
            raise InputError(f"the network draws noise more often than {len(draws)} times; give one tensor per draw")
        return tensor.transpose(0, 1).to(x)

    return draw
