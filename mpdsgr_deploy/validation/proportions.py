"""The statistics of paired verdicts: intervals for a share, a test for two classifiers on the same images."""

import math

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share correct/n; (0, 1) for n = 0. Counts may be fractions (means)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_tail(k: int, n: int) -> float:
    """Return P(X >= k) for X ~ Binomial(n, 1/2), exactly."""
    ways: int = sum(math.comb(n, i) for i in range(k, n + 1))
    return ways / (1 << n)


def exceeds(k: int, n: int, share: float) -> float:
    """Return P(X >= k) for X ~ Binomial(n, share): the p-value of k out of n if the true share is at most `share`."""
    return 1.0 - sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k))


def mcnemar(worse: int, better: int) -> float:
    """Return the exact two-sided McNemar p-value of `worse` against `better` discordant images."""
    return min(1.0, 2 * binomial_tail(max(worse, better), worse + better))


def sign_flip_tail(differences: NDArray[np.int64]) -> float:
    """Return P(sum of +-|d| >= sum of d) for integers d [n] with random signs: the exact paired permutation test.

    With differences of -1, 0 and 1 it is the one-sided McNemar test.
    """
    sizes = np.abs(differences[differences != 0])
    below = np.ones(1)  # below[k]: the probability that the negative ones add up to k
    for size in sizes.tolist():
        shifted = np.concatenate([np.zeros(size), below])
        below = (np.concatenate([below, np.zeros(size)]) + shifted) / 2
    most = int(sizes.sum() - differences.sum()) // 2  # the negative ones of these differences
    return min(1.0, float(below[: most + 1].sum()))
