"""Attacks as pure functions on the interfaces of `protocols`, for numpy arrays and torch tensors.

Importing this package does not import torch.
"""

from mpdsgr_deploy.attacks.apgd import apgd, apgd_t
from mpdsgr_deploy.attacks.blind import gaussian, uniform
from mpdsgr_deploy.attacks.carlini_wagner import cw_l2
from mpdsgr_deploy.attacks.eot import expectation
from mpdsgr_deploy.attacks.fab import fab_t
from mpdsgr_deploy.attacks.hart import hart
from mpdsgr_deploy.attacks.mpd_apgd import mpd_apgd
from mpdsgr_deploy.attacks.pgd import bim, fgsm, pgd
from mpdsgr_deploy.attacks.sa_pgd import sa_pgd
from mpdsgr_deploy.attacks.square import square

__all__ = [
    "apgd",
    "apgd_t",
    "bim",
    "cw_l2",
    "expectation",
    "fab_t",
    "fgsm",
    "gaussian",
    "hart",
    "mpd_apgd",
    "pgd",
    "sa_pgd",
    "square",
    "uniform",
]
