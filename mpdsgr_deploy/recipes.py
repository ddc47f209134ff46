"""The recipes and other files that ship with the package, in the folders `train/`, `export/` and `serve/`."""

from itertools import takewhile
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import read_extended
from mpdsgr_deploy.schema import Number, Section, parse, read_toml, to_toml

PACKAGE = Path(__file__).parent
Percent = Annotated[Number, Field(ge=0, le=100)]


class Published(Section):
    """Accuracies in % that a paper states for a recipe. table: where the paper states them."""

    table: str
    clean: Percent | None = None
    gaussian: Percent | None = None
    fgsm: Percent | None = None
    pgd: Percent | None = None
    bim: Percent | None = None


def shipped(stage: str) -> Path:
    """Return the folder of a stage ("train", "export" or "serve"), which installation moves into the package."""
    installed = PACKAGE / "shipped" / stage
    return installed if installed.is_dir() else PACKAGE.parent / stage


def built_in_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(shipped("train").glob("recipes/*.toml"), key=lambda p: p.stem)}


def find_recipe(name: str) -> Path:
    """Return a recipe's file: the path itself if `name` ends in .toml, else the recipe of that name that ships.

    Raises InputError if there is none.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"recipe file {path} does not exist; `mpdsgr recipes` lists the built-in ones")
        return path
    return choose("recipe", built_in_recipes(), name)


def title(path: Path) -> str:
    """Return a recipe's title: the comment on its first line."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def published(path: Path) -> Published | None:
    """Return the table [published] of a recipe file, None without one. Raises InputError for invalid values."""
    values = read_toml(path).get("published")
    return None if values is None else parse(Published, values, f"{path}: [published]")


def flattened(path: Path) -> str:
    """Return the text of a recipe file that extends no other: the opening comment, and all values set or inherited.

    Published figures are left out, because they belong to the original and not to an edited copy.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(takewhile(lambda line: line.startswith("#"), lines))
    values = read_extended(path)
    values.pop("published", None)
    return f"{comment}\n\n{to_toml(values)}"
