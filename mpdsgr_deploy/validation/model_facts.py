"""Facts about the network under validation, for comparing reports."""

import onnx
from pydantic import BaseModel

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.diagnostics.cost import macs, parameters


class ModelFacts(BaseModel):
    """A network's training method, time steps, parameters, and multiply-accumulates per image."""

    architecture: str
    method: str
    steps: int
    parameters: int
    macs: int

    @classmethod
    def of(cls, bundle: Bundle, precision: str) -> "ModelFacts":
        recipe, network = bundle.manifest.recipe, onnx.load(bundle.variant(precision))
        return cls(
            architecture=f"{recipe.model.name}, width {recipe.model.width:g}",
            method=recipe.method,
            steps=recipe.encoding.T,
            parameters=parameters(network),
            macs=macs(network, recipe.encoding.T).exported,
        )
