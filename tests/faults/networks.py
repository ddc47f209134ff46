"""The networks that faults are planted in: tiny, trained once, kept in a directory."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.data import load_test, load_training
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.exporting.precision import PRECISIONS
from mpdsgr_deploy.recipe import Data, Recipe
from mpdsgr_deploy.training import train

BASE: dict[str, dict[str, Any]] = {
    "data": {"name": "digits", "augment": "none"},
    "model": {"name": "vgg-small", "width": 0.25},
    "encoding": {"T": 2},
    "training": {"epochs": 3, "batch_size": 65, "pictures": 0},
    "attack": {"eps": 0.1, "step": 0.03, "strong_steps": 20, "surrogates": ["triangle:0.5"]},
    "validation": {"limit": 100},
}
# How each kind of network differs from the base, and the precisions in which it is exported
KINDS: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = {
    "healthy": ({}, PRECISIONS),
    "other": ({"training": {"seed": 1, "epochs": 2}}, PRECISIONS),
    "colour": ({"data": {"name": "imagefolder", "image_size": 8}, "training": {"epochs": 10}}, ("fp32",)),
    "noisy": ({"encoding": {"name": "poisson"}, "attack": {"draws": 4}}, ("fp32",)),
    "sharp": ({"neuron": {"surrogate": "triangle", "surrogate_parameter": 0.05}}, ("fp32",)),
    "wide": ({"neuron": {"surrogate": "rectangular", "surrogate_parameter": 8.0}}, ("fp32",)),
}


class Networks:
    """Bundles by kind, each trained and exported when it is first asked for; `given` are there already."""

    def __init__(self, directory: Path, **given: Bundle) -> None:
        self._directory, self._given = directory, given

    def recipe(self, kind: str) -> Recipe:
        """Of a kind, or of the healthy network trained and attacked with another seed: "seed 3"."""
        sections: dict[str, dict[str, Any]] = KINDS.get(kind, ({}, ()))[0]
        if kind.startswith("seed "):
            sections = {name: {"seed": int(kind[5:])} for name in ("training", "validation")}
        values = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}
        recipe = Recipe.model_validate(values)
        if kind == "colour":
            coloured_digits(self._directory / "coloured")
            recipe = recipe.model_copy(update={"data": recipe.data.at(str(self._directory / "coloured"))})
        return recipe

    def bundle(self, kind: str) -> Bundle:
        if kind not in self._given:
            self._given[kind] = open_bundle(self.made(kind))
        return self._given[kind]

    def made(self, kind: str) -> Path:
        """The folder of the bundle, written if it is not there."""
        name = kind.replace(" ", "-")
        run, out = self._directory / f"run-{name}", self._directory / f"bundle-{name}"
        if not out.exists():
            recipe = self.recipe(kind)
            shutil.rmtree(run, ignore_errors=True)  # of a call that was killed
            train(recipe, run)
            export(run, out, precisions=KINDS.get(kind, KINDS["healthy"])[1], root=recipe.data.root)
        return out


def coloured_digits(root: Path) -> None:
    """An image folder of the digits 0 to 4, each in red and in blue: classes that need their channels."""
    if root.exists():
        return
    config = Data(name="digits")
    for part, images in (("train", load_training(config)[0]), ("test", load_test(config))):
        for number, (pixels, digit) in enumerate(zip(images.pixels[:400, 0], images.classes[:400], strict=True)):
            for colour, channel in (("blue", 2), ("red", 0)):
                picture = np.zeros((8, 8, 3), np.uint8)
                picture[..., channel] = pixels
                if digit < 5:
                    folder = root / part / f"{digit}-{colour}"
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(folder / f"{number}.png")
