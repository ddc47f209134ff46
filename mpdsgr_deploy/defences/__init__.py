"""Training-time defences."""

from mpdsgr_deploy.defences.adversarial import adversarial_examples

__all__ = ["adversarial_examples"]
