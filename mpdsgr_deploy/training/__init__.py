"""Training on Lightning Fabric: from a recipe to checkpoints."""

from mpdsgr_deploy.training.run import train

__all__ = ["train"]
