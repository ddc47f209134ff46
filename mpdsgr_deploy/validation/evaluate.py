"""A trained network on clean, noisy and attacked test images, without an export."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from mpdsgr_deploy.checkpoint import load_checkpoint, load_model
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.runtime import predict
from mpdsgr_deploy.runtime.torch_model import TorchModel
from mpdsgr_deploy.validation.conditions import conditions
from mpdsgr_deploy.validation.rows import Score


class EvaluatedRow(BaseModel):
    """One network under one condition."""

    name: str
    settings: str
    n: int
    score: Score


class Evaluation(BaseModel):
    """All conditions, and `worst`: right under every one within eps."""

    images: str
    seed: int
    rows: list[EvaluatedRow]
    provenance: dict[str, Any]


def evaluate(
    checkpoint_dir: Path, *, root: str | None = None, limit: int | None = None, transfer: Path | None = None
) -> Evaluation:
    """Attack the network of a checkpoint in its recipe's setting, on the first `limit` test images."""
    checkpoint = load_checkpoint(checkpoint_dir)
    recipe, shape = checkpoint.recipe, checkpoint.shape
    config = recipe.validation
    images = load_test(recipe.data.model_copy(update={} if root is None else {"root": root}))[: limit or config.limit]
    model = TorchModel(load_model(checkpoint_dir / checkpoint.weights, recipe, shape, len(checkpoint.labels)), shape)
    x, y = images.unit(), images.classes
    rows, standing = [], np.ones(len(y), np.bool_)
    for found in conditions(model.gradient, x, y, recipe.attack, batch_size=config.batch_size, seed=config.seed):
        correct = predict(model, found.images, config.batch_size).argmax(1) == y
        standing &= correct | (found.eps is None)
        rows.append(EvaluatedRow(name=found.name, settings=found.settings, n=len(y), score=Score.of(correct)))
    worst = "right under every condition within eps"
    rows.append(EvaluatedRow(name="worst", settings=worst, n=len(y), score=Score.of(standing)))
    rule = f"the first {len(y)} test images of {recipe.data.name}"
    return Evaluation(images=rule, seed=config.seed, rows=rows, provenance=provenance())
