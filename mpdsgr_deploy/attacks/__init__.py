"""Attacks as pure functions on the two protocols; numpy arrays and torch tensors alike. Nothing here imports torch."""

from mpdsgr_deploy.attacks.carlini_wagner import cw_l2
from mpdsgr_deploy.attacks.expectation import expectation
from mpdsgr_deploy.attacks.noise import gaussian, uniform
from mpdsgr_deploy.attacks.pgd import bim, fgsm, pgd

__all__ = ["bim", "cw_l2", "expectation", "fgsm", "gaussian", "pgd", "uniform"]
