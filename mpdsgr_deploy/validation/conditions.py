"""What the images are put through: each condition turns clean images into attacked ones, once, for every network."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks import bim, cw_l2, fgsm, gaussian, pgd, uniform
from mpdsgr_deploy.attacks.pgd import Keep
from mpdsgr_deploy.progress import track
from mpdsgr_deploy.protocols import Differentiable
from mpdsgr_deploy.recipe import Attack

if TYPE_CHECKING:
    from mpdsgr_deploy.runtime.torch_model import TorchModel

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]


class Condition(NamedTuple):
    """Images [N, C, H, W] under one attack. `eps` bounds their distance from the clean ones; None: no bound."""

    name: str
    settings: str
    eps: float | None
    images: Floats


KEPT: dict[Keep, str] = {"broken": "broken by any iterate", "worst": "the iterate of the largest loss"}
# The order in which accuracy must not rise, weakest attack first (health check 2).
BY_STRENGTH = ("uniform", "fgsm", "pgd", "pgd-strong")


class Attackers(NamedTuple):
    """The attacked network as its attackers differentiate it.

    `trained` through the surrogate it was trained with, `surrogates` through others, `margin` the margin in place of
    the cross-entropy, `transfer` another network whose adversarial images are tried on this one; None: not attempted.
    `stochastic`: the network draws noise.
    """

    trained: Differentiable
    surrogates: Mapping[str, Differentiable] = MappingProxyType({})
    margin: Differentiable | None = None
    transfer: Differentiable | None = None
    stochastic: bool = False


def torch_attackers(model: "TorchModel", attack: Attack, transfer: "TorchModel | None" = None) -> Attackers:
    """Every attacker that `attack` asks for. Raises InputError for an unknown surrogate."""
    from mpdsgr_deploy.attacks.torch_target import margin

    draws = attack.draws
    return Attackers(
        trained=model.attacker(draws=draws),
        surrogates={name: model.attacker(name, draws=draws) for name in attack.surrogates},
        margin=model.attacker(loss=margin, draws=draws) if attack.l2 else None,
        transfer=transfer.attacker(draws=draws) if transfer else None,
        stochastic=model.stochastic,
    )


def conditions(
    attackers: Attackers, x: Floats, y: Classes, attack: Attack, *, batch_size: int, seed: int
) -> Iterator[Condition]:
    """Clean, noise and the attacks, one after the other.

    Noise and random starts are drawn for all images at once from (seed, attack), so they depend neither on the batch
    size nor on which attacks ran before.
    """
    eps = attack.eps
    strongest: Keep = "worst" if attackers.stochastic else "broken"

    def rng(*number: int) -> np.random.Generator:
        return np.random.default_rng((seed, *number))

    def batched(name: str, run: Callable[[Floats, Classes, Floats], Floats], start: Floats | None = None) -> Floats:
        """`run` on consecutive batches of images, classes and random starts."""
        starts = start if start is not None else x
        cuts = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
        return np.concatenate([run(x[cut], y[cut], starts[cut]) for cut in track(cuts, name)])

    def random_pgd(name: str, target: Differentiable, draw: np.random.Generator, *, strong: bool = False) -> Condition:
        step, steps = (eps / 4, attack.strong_steps) if strong else (attack.step, attack.steps)
        keep: Keep = strongest if strong else "last"
        images = batched(
            name,
            lambda x, y, s: pgd(target, x, y, eps=eps, step=step, steps=steps, draw=lambda _: s, keep=keep),
            draw.uniform(-1, 1, x.shape).astype(np.float32),
        )
        how = f"{steps} steps of eps/4, random start, {KEPT[keep]}" if strong else f"{paper}, random start"
        return Condition(name, f"eps {eps:.4g}, {how}", eps, images)

    yield Condition("clean", "test images as they are", 0.0, x)
    std = attack.gaussian_std
    yield Condition("gaussian", f"N(0, {std:.4g}^2)", None, gaussian(x, std=std, rng=rng(1)))
    yield Condition("uniform", f"U(-{eps:.4g}, {eps:.4g})", eps, uniform(x, eps=eps, rng=rng(2)))
    trained = attackers.trained
    yield Condition("fgsm", f"eps {eps:.4g}", eps, batched("FGSM", lambda x, y, _: fgsm(trained, x, y, eps=eps)))
    paper = f"{attack.steps} steps of {attack.step:.4g}, last iterate"

    def iterative(x: Floats, y: Classes, _: Floats) -> Floats:
        return bim(trained, x, y, eps=eps, step=attack.step, steps=attack.steps)

    yield Condition("bim", f"eps {eps:.4g}, {paper}", eps, batched("BIM", iterative))
    yield random_pgd("pgd", trained, rng(3))
    if attackers.transfer is not None:
        yield random_pgd("transfer", attackers.transfer, rng(5))
    yield random_pgd("pgd-strong", trained, rng(4), strong=True)
    for number, (surrogate, target) in enumerate(attackers.surrogates.items()):
        yield random_pgd(f"strong {surrogate}", target, rng(6, number), strong=True)
    if attackers.margin is not None and attack.l2 is not None:
        margin, radius = attackers.margin, attack.l2
        found = batched("CW-L2", lambda x, y, _: cw_l2(margin, x, y))
        within = np.sqrt(((found - x) ** 2).sum((1, 2, 3), keepdims=True)) <= radius
        yield Condition("cw-l2", f"CW-L2 within an L2 distance of {radius:.4g}", None, np.where(within, found, x))
