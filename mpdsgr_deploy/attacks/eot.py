"""Expectation over transformation (EOT, Athalye et al., arXiv 1707.07397): attack the mean of a stochastic network."""

from mpdsgr_deploy.protocols import Array, Differentiable, Gradient


def expectation(target: Differentiable, draws: int) -> Differentiable:
    """Return a Differentiable that averages logits, loss and gradient over `draws` >= 1 evaluations of `target`.

    Every evaluation of a stochastic target draws new noise.
    """

    def average(x: Array, y: Array) -> Gradient:
        gradients = [target(x, y) for _ in range(draws)]
        return Gradient(*(sum(parts) / draws for parts in zip(*gradients, strict=True)))

    return average
