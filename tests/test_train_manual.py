"""The manual in train/README.md is complete, and the files that it shows are valid."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from mpdsgr_deploy.attacks.tiers import CONDITIONS
from mpdsgr_deploy.cli import study, table, train
from mpdsgr_deploy.data import DATASETS
from mpdsgr_deploy.defences import DEFENCES
from mpdsgr_deploy.experiments.study import Study, built_in_studies, load_study
from mpdsgr_deploy.experiments.table import TableSpec, built_in_tables, load_table
from mpdsgr_deploy.exporting.precision import PRECISIONS
from mpdsgr_deploy.models import MODELS
from mpdsgr_deploy.prediction.writers import FORMATS
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import built_in_recipes
from mpdsgr_deploy.runtime import BACKENDS
from mpdsgr_deploy.surrogates import KINDS

ROOT = Path(__file__).parent.parent
MANUAL = (ROOT / "train" / "README.md").read_text()
WORD = re.compile(r"\.?[\w-]+")
FILES = re.findall(r"```toml\n(.*?)```", MANUAL, re.DOTALL)


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_file_that_the_manual_shows_is_valid(text: str, tmp_path: Path) -> None:
    for path in built_in_recipes().values():
        (tmp_path / path.name).symlink_to(path)
    file = tmp_path / "shown.toml"
    file.write_text(text)
    if "[[settings]]" in text:
        assert load_study(str(file))[1].table().rows
    elif "[[rows]]" in text:
        assert load_table(str(file))[1].rows
    else:
        assert load_recipe(file).defence


@pytest.mark.parametrize("command", [train.command, table.command, study.command], ids=lambda command: command.name)
def test_the_manual_names_every_option(command: object) -> None:
    options = {name for option in command.params for name in option.opts if name.startswith("--")}
    assert sorted(name for name in options if f"{name}" not in MANUAL) == []


def test_the_manual_names_every_key() -> None:
    keys = {f"{section}.{key}" for section, field in Recipe.model_fields.items() for key in fields(field.default)}
    keys |= {key for model in (TableSpec, Study) for key in model.model_fields}
    assert len(keys) > 50
    assert sorted(key for key in keys if f"{key.rpartition('.')[2]}" not in MANUAL) == []


@pytest.mark.parametrize(
    ("stage", "choices"),
    [
        ("train", MODELS.loaded),
        ("train", KINDS.loaded),
        ("train", DEFENCES.loaded),
        ("train", DATASETS.loaded),
        ("export", CONDITIONS.loaded),
        ("export", BACKENDS.loaded),
        ("export", PRECISIONS),
        ("export", FORMATS),
    ],
    ids=["models", "surrogates", "defences", "data sets", "attacks", "backends", "precisions", "formats"],
)
def test_the_manuals_name_every_choice(stage: str, choices: Iterable[str]) -> None:
    manual = (ROOT / stage / "README.md").read_text()
    blocks = re.compile(r"```.*?```", re.DOTALL)
    code = [*blocks.findall(manual), *re.findall(r"`[^`\n]+`", blocks.sub("", manual))]
    written = {word for part in code for word in WORD.findall(part)}
    assert sorted(name for name in built_in(choices) if name not in written) == []


def built_in(choices: Iterable[str]) -> Iterable[str]:
    """The choices without what other tests of this process registered."""
    if not isinstance(choices, Mapping):
        return choices
    tests = {file.stem for file in Path(__file__).parent.glob("*.py")}
    return [name for name, entry in choices.items() if getattr(entry, "__module__", "") not in tests]


def fields(section: object) -> list[str]:
    return list(getattr(type(section), "model_fields", {}))


def test_the_manual_lists_every_table_and_study() -> None:
    assert [name for name in built_in_tables() if f"`{name}`" not in MANUAL] == []
    studies = (ROOT / "train" / "studies" / "README.md").read_text()
    assert [name for name in built_in_studies() if f"`{name}`" not in studies] == []
