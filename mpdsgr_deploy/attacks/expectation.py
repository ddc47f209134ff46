"""Expectation over transformation (EOT, Athalye et al., arXiv 1707.07397): attack the mean of a stochastic network."""

from collections.abc import Sequence

from mpdsgr_deploy.protocols import Adaptive, Array, Differentiable, Gradient


def expectation(target: Differentiable, draws: int) -> Differentiable:
    """Averages logits, loss and gradient over `draws` >= 1 evaluations of `target`, each with noise of its own."""

    def average(x: Array, y: Array) -> Gradient:
        found = [target(x, y) for _ in range(draws)]
        return Gradient(*(sum(parts) / draws for parts in zip(*found, strict=True)))

    return average


def adaptive_expectation(target: Adaptive, draws: int) -> Adaptive:
    """`expectation` of a target with widths; the distances are averaged as well."""

    def average(x: Array, y: Array, widths: Sequence[Array] | None) -> tuple[Gradient, list[Array]]:
        gradients, distances = zip(*(target(x, y, widths) for _ in range(draws)), strict=True)
        mean = Gradient(*(sum(parts) / draws for parts in zip(*gradients, strict=True)))
        return mean, [sum(parts) / draws for parts in zip(*distances, strict=True)]

    return average
