"""Training on Lightning Fabric: from a recipe to checkpoints."""

from mpdsgr_deploy.training.training_run import origin, train

__all__ = ["origin", "train"]
