"""Options that take numbers with commas between them."""

from math import inf, isfinite
from typing import TypeVar

from mpdsgr_deploy.errors import InputError

Number = TypeVar("Number", int, float)


def number_list(
    option: str,
    text: str,
    kind: type[Number],
    example: str,
    *,
    low: float = -inf,
    high: float = inf,
    counts: tuple[float, float] = (1, inf),
) -> list[Number]:
    """Return the numbers of an option's value. Raises InputError, which shows `example`, for anything else.

    low, high: bounds of the numbers. counts: the smallest and the largest number of them.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not counts[0] <= len(numbers) <= counts[1] or not all(isfinite(n) and low <= n <= high for n in numbers):
        bounds = f" from {low:g}" * (low > -inf) + f" to {high:g}" * (high < inf)
        few, many = counts
        count = "" if many == inf else f"{many:g} " if few == many else f"{few:g} to {many:g} "
        what = f"{count}{'whole numbers' if kind is int else 'numbers'}"
        raise InputError(f"{option} {text!r}: write {what}{bounds} with commas between them, such as {example}")
    return numbers
