"""The Square attack in the L-infinity ball (Andriushchenko et al., arXiv 1912.00049): random search, no gradient.

It evaluates only the artefact's logits, so neither a surrogate nor a missing gradient can mislead it.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.attacks.pgd import project
from mpdsgr_deploy.protocols import Predictor

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

P_INIT = 0.8  # share of the image's pixels that the first squares cover
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # proposals of 10,000 after which the share halves
CHUNK = 64  # proposals for which random words are generated at once


class SquareState(NamedTuple):
    """The state, and finally the result, of an attack."""

    images: Floats  # [B, C, H, W], the image that fools the network, or else the one of the smallest margin
    margin: Floats  # [B], the true logit minus the largest wrong one at `images`
    standing: NDArray[np.bool_]  # [B], whether the image is still classified correctly
    queries: Ints  # [B], number of queries


def square(
    predictor: Predictor,
    x: Floats,
    y: Ints,
    *,
    eps: float,
    queries: int = 5000,
    seed: int = 0,
    indices: Ints | None = None,
) -> SquareState:
    """Attack x [B, C, H, W] in [0, 1] with classes y [B] by at most `queries` queries per image.

    The first query is the image itself, the second adds vertical stripes of +-eps, the others propose squares of +-eps.
    A proposal is accepted if it lowers the margin or leaves it unchanged: a small spiking network gives the same logits
    for many changes, and a search that does not move on such a plateau never reaches its edge. (On digits with 1000
    queries, accepting equal margins lowers the share of unbroken images from 41 % to 30 % for a network of 2 time steps
    and an eighth of the width; for 4 time steps at full width it makes no difference.) The share of the image that a
    square covers falls by the published schedule for 10,000 queries, rescaled for fewer. An image leaves the batch once
    the network is fooled.

    indices [B]: each image's number in the data set; None: 0, 1, .... The random choices for an image depend only on
    its number and the seed.
    """
    numbers = np.arange(len(x)) if indices is None else indices
    state = _begin(predictor, x, y, eps, seed, numbers)
    dice = _Dice(seed, numbers, x.shape[1])
    for step in range(queries - 2):
        active = np.flatnonzero(state.standing)
        if not active.size:
            break
        _propose(predictor, state, x, y, eps, active, dice.words(step, active), share(step, queries))
    return state


def share(step: int, queries: int) -> float:
    """Return the share of the image that a square covers at proposal `step` of an attack with `queries` queries."""
    return P_INIT / 2 ** bisect_left(HALVINGS, step * max(1.0, 10_000 / queries))


def _begin(predictor: Predictor, x: Floats, y: Ints, eps: float, seed: int, numbers: Ints) -> SquareState:
    """Make the first two queries: the images, then stripes on the images that are classified correctly."""
    count, channels, _, width = x.shape
    margin, standing = _judge(predictor(x), y)
    state = SquareState(x.copy(), margin, standing, np.ones(count, np.int64))
    active = np.flatnonzero(standing)
    if active.size:
        words = np.stack([_raw(seed, number, (0, 1), -(-channels * width // 64)) for number in numbers[active]])
        signs = _signs(words, channels * width).reshape(-1, channels, 1, width)
        striped = project(x[active] + np.float32(eps) * signs, x[active], eps)
        state.images[active] = striped
        state.margin[active], state.standing[active] = _judge(predictor(striped), y[active])
        state.queries[active] += 1
    return state


def _propose(
    predictor: Predictor,
    state: SquareState,
    x: Floats,
    y: Ints,
    eps: float,
    active: Ints,
    words: NDArray[np.uint64],
    share: float,
) -> None:
    """Propose one square on each of the A active images, in place.

    words [A, 2 + ceil(C / 64) or more]: the random row, column and signs. share: share of the image that is covered.
    """
    _, channels, height, width = x.shape
    side = max(1, round((share * height * width) ** 0.5))
    rows, columns = (_window(word, length, side) for word, length in zip(words.T[:2], (height, width), strict=True))
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    step = np.float32(eps) * _signs(words[:, 2:], channels)[:, :, None, None]
    clean, best = x[active], state.images[active]
    proposal = np.where(inside, project(clean + step, clean, eps), best)
    # where the proposal changes nothing, the square of the opposite signs is proposed
    idle = (proposal == best).all((1, 2, 3))
    proposal[idle] = np.where(inside[idle], project(clean[idle] - step[idle], clean[idle], eps), best[idle])
    margin, standing = _judge(predictor(proposal), y[active])
    better = (margin <= state.margin[active]) | ~standing
    improved = active[better]
    state.images[improved], state.margin[improved] = proposal[better], margin[better]
    state.standing[active] = standing
    state.queries[active] += 1


def _judge(logits: Floats, y: Ints) -> tuple[Floats, NDArray[np.bool_]]:
    """Return each image's margin [B] and whether it is classified correctly [B], for logits [B, K].

    The margin is the true logit minus the largest wrong one; for K = 1 it is 0.
    """
    if logits.shape[1] == 1:
        return np.zeros(len(logits), np.float32), np.ones(len(logits), bool)
    true = np.take_along_axis(logits, y[:, None], 1)[:, 0]
    others = logits.copy()
    np.put_along_axis(others, y[:, None], -np.inf, 1)
    return true - others.max(1), logits.argmax(1) == y


def _window(words: NDArray[np.uint64], length: int, side: int) -> NDArray[np.bool_]:
    """Return which of `length` rows or columns lie in a square [A, length], whose position is drawn from words [A]."""
    side = min(side, length)
    first = ((words >> np.uint64(11)) * 2.0**-53 * (length - side + 1)).astype(np.int64)[:, None]
    places = np.arange(length)
    return (places >= first) & (places < first + side)


def _signs(words: NDArray[np.uint64], count: int) -> Floats:
    """Return the first `count` bits of words [A, W] as -1 or 1 [A, count]."""
    bits = np.arange(count)
    chosen = (words[:, bits // 64] >> (bits % 64).astype(np.uint64)) & np.uint64(1)
    return chosen.astype(np.float32) * 2 - 1


class _Dice:
    """The random words of each image's proposals, generated for CHUNK proposals at a time."""

    def __init__(self, seed: int, numbers: Ints, channels: int) -> None:
        self._seed, self._numbers = seed, numbers
        self._blocks = -(-(2 + -(-channels // 64)) // 4)  # blocks of 4 words, in which Philox counts, per proposal
        self._chunk, self._words = -1, np.empty(0, np.uint64)

    def words(self, step: int, active: Ints) -> NDArray[np.uint64]:
        """Return the words [A, 4 or more] of proposal number `step`: a row, a column, and signs."""
        chunk, place = divmod(step, CHUNK)
        if chunk != self._chunk:
            per_image = CHUNK * self._blocks * 4
            self._words = np.zeros((len(self._numbers), CHUNK, self._blocks * 4), np.uint64)
            for i in active:
                raw = _raw(self._seed, self._numbers[i], (chunk * CHUNK * self._blocks, 0), per_image)
                self._words[i] = raw.reshape(CHUNK, -1)
            self._chunk = chunk
        return self._words[active, place]


def _raw(seed: int, number: int, counter: tuple[int, int], count: int) -> NDArray[np.uint64]:
    """Return `count` words of the stream of image `number`, from `counter` on.

    NEP 19 guarantees that Philox yields the same words in every version of numpy.
    """
    place = np.array([counter[0], 0, 0, counter[1]], np.uint64)
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=place).random_raw(count)
