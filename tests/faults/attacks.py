"""Attacked images that break the attack's rules: faults of the evaluation."""

from collections.abc import Callable

import numpy as np

from faults.planted import Array, Planted, fault
from mpdsgr_deploy.attacks import conditions


def spoil(copy: Planted, attack: str, how: Callable[[Array, Array], Array]) -> None:
    """Let an attack give what `how` makes of its images and of the clean ones."""
    true = getattr(conditions, attack)

    def spoilt(target: object, x: Array, y: Array, **options: object) -> Array:
        return how(true(target, x, y, **options), x).astype(np.float32)

    copy.patch.setattr(conditions, attack, spoilt)


@fault("evaluation", 3, "check 1")
def attacked_images_saved_as_bytes(copy: Planted) -> None:
    """Adversarial images kept as PNG files, which weakens them."""
    spoil(copy, "pgd", lambda attacked, clean: np.rint(attacked * 255) / 255)


@fault("evaluation", 3, "check 1")
def attack_further_than_eps(copy: Planted) -> None:
    """A projection forgotten: the network looks worse than it is."""
    spoil(copy, "pgd", lambda attacked, clean: np.clip(clean + 1.2 * (attacked - clean), 0, 1))


@fault("evaluation", 2, "pixels must be finite")
def attack_leaves_the_range_of_pixels(copy: Planted) -> None:
    """No clamp to [0, 1]: the exported network meets images that no camera gives."""
    spoil(copy, "fgsm", lambda attacked, clean: clean + 1.5 * (attacked - clean) - 0.05)


@fault("evaluation", 3, "check 2", thorough=True)
def attack_returns_the_clean_images(copy: Planted) -> None:
    """A loop that keeps the first iterate."""
    spoil(copy, "pgd", lambda attacked, clean: clean)


@fault("evaluation", 3, "check 2", thorough=True)
def attack_half_as_far_as_eps(copy: Planted) -> None:
    """eps in units of [-1, 1] where pixels are in [0, 1]."""
    spoil(copy, "pgd", lambda attacked, clean: clean + 0.5 * (attacked - clean))
