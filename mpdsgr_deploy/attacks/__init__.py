"""Attacks as pure functions on two protocols; numpy arrays and torch tensors alike. Nothing here imports torch."""

from mpdsgr_deploy.attacks.noise import gaussian, uniform
from mpdsgr_deploy.attacks.pgd import bim, fgsm, pgd
from mpdsgr_deploy.attacks.protocols import Differentiable, Gradient, Predictor

__all__ = ["Differentiable", "Gradient", "Predictor", "bim", "fgsm", "gaussian", "pgd", "uniform"]
