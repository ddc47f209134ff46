"""Attacks as pure functions on the two protocols; numpy arrays and torch tensors alike. Nothing here imports torch."""

from mpdsgr_deploy.attacks.noise import gaussian, uniform
from mpdsgr_deploy.attacks.pgd import bim, fgsm, pgd

__all__ = ["bim", "fgsm", "gaussian", "pgd", "uniform"]
