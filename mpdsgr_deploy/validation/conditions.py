"""What the images are put through: each condition turns clean images into attacked ones, once, for every network."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks import bim, fgsm, gaussian, pgd, uniform
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.protocols import Differentiable
from mpdsgr_deploy.recipe import Attack

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]


class Condition(NamedTuple):
    """Images [N, C, H, W] under one attack. `eps` bounds their distance from the clean ones; None: no bound."""

    name: str
    settings: str
    eps: float | None
    images: Floats


# The order in which accuracy must not rise, weakest attack first (health check 2).
BY_STRENGTH = ("uniform", "fgsm", "pgd", "pgd-strong")


def conditions(
    target: Differentiable, x: Floats, y: Classes, attack: Attack, *, batch_size: int, seed: int
) -> Iterator[Condition]:
    """Clean, noise and the gradient attacks on `target`, one after the other.

    Noise and random starts are drawn for all images at once from (seed, attack), so they depend neither on the batch
    size nor on which attacks ran before.
    """
    eps = attack.eps

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng((seed, number))

    def batched(name: str, run: Callable[[Floats, Classes, Floats], Floats], start: Floats | None = None) -> Floats:
        """`run` on consecutive batches of images, classes and random starts."""
        starts = start if start is not None else x
        cuts = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
        return np.concatenate([run(x[cut], y[cut], starts[cut]) for cut in track(cuts, name)])

    def random_pgd(name: str, number: int, step: float, steps: int, keep_broken: bool) -> Floats:
        start = rng(number).uniform(-1, 1, x.shape).astype(np.float32)
        return batched(
            name,
            lambda x, y, s: pgd(
                target, x, y, eps=eps, step=step, steps=steps, draw=lambda _: s, keep_broken=keep_broken
            ),
            start,
        )

    def iterative(x: Floats, y: Classes, _: Floats) -> Floats:
        return bim(target, x, y, eps=eps, step=attack.step, steps=attack.steps)

    yield Condition("clean", "test images as they are", 0.0, x)
    std = attack.gaussian_std
    yield Condition("gaussian", f"N(0, {std:.4g}^2)", None, gaussian(x, std=std, rng=rng(1)))
    yield Condition("uniform", f"U(-{eps:.4g}, {eps:.4g})", eps, uniform(x, eps=eps, rng=rng(2)))
    yield Condition("fgsm", f"eps {eps:.4g}", eps, batched("FGSM", lambda x, y, _: fgsm(target, x, y, eps=eps)))
    paper = f"eps {eps:.4g}, {attack.steps} steps of {attack.step:.4g}"
    yield Condition("bim", paper, eps, batched("BIM", iterative))
    yield Condition(
        "pgd",
        f"{paper}, random start, last iterate",
        eps,
        random_pgd("PGD", 3, attack.step, attack.steps, keep_broken=False),
    )
    yield Condition(
        "pgd-strong",
        f"eps {eps:.4g}, {attack.strong_steps} steps of eps/4, random start, broken by any iterate",
        eps,
        random_pgd("PGD strong", 4, eps / 4, attack.strong_steps, keep_broken=True),
    )
