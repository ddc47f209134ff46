"""Three sizes of evaluation: how many images, how strong the attacks are, and what such an evaluation can decide."""

from typing import NamedTuple


class Tier(NamedTuple):
    """How much is attacked, and how hard."""

    images: int | None  # the first so many test images; None: all
    probe: int  # images that the checks of growing eps and of convergence look at
    max_drop: float  # loss of accuracy allowed where the gate does not say
    queries: int  # of Square, an image
    restarts: int = 1  # of the strong PGD through the trained surrogate
    apgd_steps: int = 0  # 0: no APGD
    sweep: bool = False  # also through every surrogate that the recipe names


TIERS = {
    "commit": Tier(images=100, probe=50, max_drop=0.09, queries=100),
    "release": Tier(images=1000, probe=200, max_drop=0.01, queries=1000, apgd_steps=100),
    "paper": Tier(images=None, probe=500, max_drop=0.01, queries=5000, restarts=5, apgd_steps=100, sweep=True),
}
