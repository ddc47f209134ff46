"""Networks that other libraries exported, and digits to show them."""

from pathlib import Path

from mpdsgr_deploy.data import Images, load_test
from mpdsgr_deploy.recipe import Data, Recipe
from mpdsgr_deploy.runtime import OnnxRuntime

FOREIGN = Path(__file__).parent / "foreign"


def file(name: str) -> Path:
    return FOREIGN / f"{name}.onnx"


def digits(count: int) -> Images:
    return load_test(Data(name="digits"))[:count]


def open_onnx(path: Path) -> OnnxRuntime:
    return OnnxRuntime(path)


def quick() -> Recipe:
    return Recipe.model_validate({"attack": {"strong_steps": 2, "steps": 2, "step": 0.02}, "data": {"name": "digits"}})
