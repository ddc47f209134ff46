"""The statistics of paired verdicts: intervals of a share, tests of two classifiers on the same images, their power.

Power is computed for this model: with a true drop of d, an image becomes wrong with probability s + d and right with
probability s, where s is the rate at which rounding alone flips verdicts in each direction. The number of flips is then
binomial, and so is the number of flips for the worse among them. The gate's own test is applied to every outcome, so
the probability of refusal is exact.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RELIABLE = 0.9  # probability with which the gate must refuse a drop that counts as detectable
SPREAD = 8.0  # sums over the number of flips end this many standard deviations from its mean
RESOLUTION = 5e-4  # resolution of the smallest detectable drop

Floats = NDArray[np.float64]


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the share correct / n; (0, 1) for n = 0.

    correct: need not be an integer, so that it may be a mean over seeds.
    """
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
    """Return the p-value of the exact two-sided McNemar test: `worse` images newly wrong, `better` newly right."""
    return min(1.0, 2 * binomial_tail(max(worse, better), worse + better))


def sign_flip_tail(differences: NDArray[np.int64]) -> float:
    """Return the p-value of the exact one-sided paired permutation test of integers d [n] = `differences`.

    It is P(sum of +-|d| >= sum of d) for random signs. For differences of -1, 0 and 1 it is the one-sided McNemar test.
    """
    sizes = np.abs(differences[differences != 0])
    negative = np.ones(1)  # negative[k]: the probability that the sizes with a negative sign add up to k
    for size in sizes.tolist():
        shifted = np.concatenate([np.zeros(size), negative])
        negative = (np.concatenate([negative, np.zeros(size)]) + shifted) / 2
    measured = int(sizes.sum() - differences.sum()) // 2  # the sum of the sizes whose measured sign is negative
    return min(1.0, float(negative[: measured + 1].sum()))


@lru_cache(1024)  # most rows of a report have the same few flips
def smallest_drop(n: int, allowed: float, worse: int, better: int, significant: float) -> float | None:
    """Return the smallest true drop in [0, 1] that the gate refuses with a probability of 90 %; None if there is none.

    allowed: the gate's limit, in [0, 1]; worse, better: the images among n that became wrong and right in this run;
    significant: the p-value below which the gate calls a drop significant.
    """
    # the smaller count is the estimate of how many verdicts rounding alone flips in each direction
    flips = min(worse, better) / n
    low, high = 0.0, 1.0 - 2 * flips
    if allowed >= 1 or refused(n, allowed, flips, high, significant) < RELIABLE:
        return None
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        if refused(n, allowed, flips, middle, significant) < RELIABLE:
            low = middle
        else:
            high = middle
    return high


def refused(n: int, allowed: float, flips: float, drop: float, significant: float) -> float:
    """Return the probability that the gate refuses a true drop of `drop`.

    flips: the probability that rounding alone flips a verdict, in each direction; others: see `smallest_drop`.
    """
    rate = 2 * flips + drop
    if rate <= 0:
        return 0.0
    spread = SPREAD * math.sqrt(n * rate * (1 - rate)) + 1
    fewest, most = max(0, math.floor(n * rate - spread)), min(n, math.ceil(n * rate + spread))
    counts = np.arange(fewest, most + 1)
    weights = np.exp(_log_binomial(n, counts, rate))
    share, limit = (flips + drop) / rate, allowed * n + 1e-9  # a flip is for the worse with probability `share`
    chances = [np.exp(_log_binomial(k, _refused_counts(k, limit, significant), share)).sum() for k in counts.tolist()]
    return float(weights @ np.array(chances))


@lru_cache(4096)
def _refused_counts(discordant: int, limit: float, significant: float) -> NDArray[np.int64]:
    """Return the numbers of flips for the worse, among `discordant` flips, that the gate refuses."""
    worse = np.arange(discordant + 1)
    # tails[k]: the probability that at least k flips are for the worse by chance
    tails = np.cumsum(np.exp(_log_binomial(discordant, worse, 0.5))[::-1])[::-1]
    return worse[(tails < significant) & (2 * worse - discordant > limit)]


def _log_binomial(n: int, k: NDArray[np.int64], p: float) -> Floats:
    """Return log P(X = k) for X ~ Binomial(n, p)."""
    log_factorials = _log_factorials(n)
    ways = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
    with np.errstate(divide="ignore", invalid="ignore"):
        hits = np.where(k > 0, k * np.log(p), 0.0)
        misses = np.where(n - k > 0, (n - k) * np.log1p(-p), 0.0)
    return np.asarray(ways + hits + misses)


@lru_cache(4096)
def _log_factorials(n: int) -> Floats:
    """Return log k! for k from 0 to n, [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
