"""Which attempts `research.py` makes, by portfolio.

research   many surrogates, losses and random starts with 500 steps each; each attempt meets what still stands
each       many kinds of attempt with 100 steps on the same images, those that the first attempt leaves
grid       APGD through superspike:k by k and number of steps, each on all images
averaged   HART and its relatives, beside as many further starts through heavy tails, on what MPD-APGD leaves
layers     another sharpness in one layer at a time, beside as many further starts, on what MPD-APGD leaves
tails      ASSG's sharpness searched over its bound and an arctangent's tails, on what APGD through superspike:1 leaves
early      the same as averaged and layers, on what APGD through superspike:1 leaves
"""

from typing import Literal, NamedTuple


class Attempt(NamedTuple):
    """One attack. wrong: the class aimed at, by its rank among the wrong ones on the clean image; None: untargeted.

    layer, factor: the surrogate of this layer, counted from the images, is `factor` times as sharp as the others.
    share: of the gradient that may vanish, below 0.5, from which `adaptive` has its sharpness.
    """

    method: str  # of `Laboratory`
    surrogate: str = ""
    loss: Literal["ce", "dlr"] = "ce"
    steps: int = 500
    seed: int = 0
    wrong: int | None = None
    layer: int | None = None
    factor: float = 1.0
    share: float = 0.4


def research() -> list[Attempt]:
    """Every kind of attempt that was seen to break an image, strongest first, most of them with several starts."""
    sharp = [f"superspike:{k}" for k in (10, 20, 30)]
    heavy = [Attempt(method, name, seed=seed) for seed in (0, 1) for method in ("apgd", "sa-pgd") for name in sharp]
    other = [Attempt("apgd", name) for name in ("superspike:5", "superspike:50", "superspike:100", "exponential:0.1")]
    dlr = [Attempt("apgd", f"superspike:{k}", "dlr") for k in (10, 30)]
    aimed = [Attempt("apgd", "superspike:20", wrong=rank) for rank in range(3)]
    narrow = [Attempt("apgd", name) for name in ("triangle:0.25", "rectangular:1", "sigmoid:20", "rate")]
    rest = [Attempt("sa-pgd", "adaptive"), Attempt("pgd", "superspike:20", steps=200), Attempt("square", steps=2000)]
    return [*heavy, *dlr, *rest, *aimed, *other, *narrow]


def each() -> list[Attempt]:
    """Kinds of attempt that cost the same, for what each adds to APGD through superspike:1."""
    heavy = ("superspike:1", "superspike:3", "superspike:10", "superspike:20", "superspike:30", "superspike:100")
    detached = [Attempt(method, "superspike:20+detached", steps=100, seed=1) for method in ("apgd", "sa-pgd")]
    thin = ("triangle:1", "triangle:0.25", "rectangular:1", "sigmoid:4", "sigmoid:20", "exponential:0.1", "rate")
    untargeted = [Attempt("apgd", name, steps=100, seed=1) for name in (*heavy, *thin, "straight-through")]
    dlr = [Attempt("apgd", "superspike:20", "dlr", steps=100, seed=1)]
    aimed = [Attempt("apgd", "superspike:20", steps=100, seed=1, wrong=rank) for rank in (0, 1)]
    other = [Attempt("sa-pgd", name, steps=100, seed=1) for name in ("adaptive", "superspike:20")]
    return [*untargeted, *dlr, *aimed, *other, *detached, Attempt("pgd", "superspike:20", steps=100, seed=1)]


def grid() -> list[Attempt]:
    """Sharpness and number of steps."""
    return [Attempt("apgd", f"superspike:{k}", steps=n) for n in (20, 100, 500) for k in (1, 3, 10, 30, 100)]


LAYERS = 3  # of vgg-small, the network of the digits bundle
FIRST = Attempt("apgd", "superspike:1", steps=100, seed=1)
MPD_APGD = Attempt("mpd-apgd", "superspike", steps=100)  # the schedule of a release


def averaged() -> list[Attempt]:
    """Gradients averaged over time and as many further starts."""
    return [MPD_APGD, *hart(), *further_starts(len(hart()))]


def layers() -> list[Attempt]:
    """A layer of another sharpness and as many further starts."""
    return [MPD_APGD, *layered(), *further_starts(len(layered()))]


def early() -> list[Attempt]:
    """All of these where more is left to break."""
    return [FIRST, *hart(), *layered(), *further_starts(len(layered()))]


def tails() -> list[Attempt]:
    """SA-PGD with ASSG from 0.6 to 0.98 of the bound of its sharpness; tails that fall as superspike:20's do."""
    assg = [Attempt("sa-pgd", "adaptive", steps=100, seed=1, share=share) for share in (0.3, 0.4, 0.45, 0.49)]
    ways = [(method, name) for name in ("arctan:13", "superspike:20") for method in ("sa-pgd", "apgd")]
    return [FIRST, *assg, *(Attempt(*way, steps=100, seed=1) for way in ways)]


def hart() -> list[Attempt]:
    """HART with the widths of its search, with heavy tails, and the rate backward."""
    triangles = [f"triangle:{width}+averaged" for width in (0.25, 0.5, 1, 2)]
    stepped = [Attempt("apgd", name, steps=100) for name in (*triangles, "superspike:20+averaged", "rate")]
    momentum = [Attempt("sa-pgd", f"{name}+averaged", steps=100) for name in ("triangle:0.5", "superspike:20")]
    return [*stepped, *momentum]


def layered() -> list[Attempt]:
    """SA-PGD with one layer three times as sharp as the others, or a third."""
    return [
        Attempt("sa-pgd", "superspike:20", steps=100, seed=1 + number, layer=number // 2, factor=(3, 1 / 3)[number % 2])
        for number in range(2 * LAYERS)
    ]


def further_starts(count: int) -> list[Attempt]:
    """What the same number of gradients breaks without anything new: SA-PGD and APGD through heavy tails."""
    ways = [(method, f"superspike:{k}") for k in (20, 30) for method in ("sa-pgd", "apgd")]
    return [Attempt(*ways[number % len(ways)], steps=100, seed=1 + number) for number in range(count)]


PORTFOLIOS = {
    "research": research,
    "each": each,
    "grid": grid,
    "averaged": averaged,
    "layers": layers,
    "tails": tails,
    "early": early,
}
CHAINED = ("research",)  # portfolios in which each attempt meets what all before it left
ON_THE_FIRSTS = ("each", "averaged", "layers", "tails", "early")  # those in which it meets what the first left
