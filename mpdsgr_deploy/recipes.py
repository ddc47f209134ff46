"""The recipes and build profiles that ship with the package: the folders `train/`, `export/` and `serve/`."""

from pathlib import Path

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose

PACKAGE = Path(__file__).parent


def shipped(stage: str) -> Path:
    """A stage's folder: beside the package in a checkout, inside it once installed."""
    installed = PACKAGE / "shipped" / stage
    return installed if installed.is_dir() else PACKAGE.parent / stage


def built_in_recipes() -> dict[str, Path]:
    """Name to file of every recipe that ships."""
    return {path.stem: path for path in sorted(shipped("train").glob("recipes/*.toml"))}


def find_recipe(name: str) -> Path:
    """A recipe file: a path if it ends in .toml, else the built-in recipe of that name."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"recipe file {path} does not exist; `mpdsgr recipes` lists the built-in ones")
        return path
    return choose("recipe", built_in_recipes(), name)


def title(path: Path) -> str:
    """What a recipe is, in its own words: the comment on its first line."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
