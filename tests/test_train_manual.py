"""The manual in train/README.md is complete, and the files that it shows are valid."""

import json
import re
from pathlib import Path

import pytest
from conftest import mpdsgr

from mpdsgr_deploy.cli import study, table, train
from mpdsgr_deploy.experiments.study import Study, built_in_studies, load_study
from mpdsgr_deploy.experiments.table import TableSpec, built_in_tables, load_table
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import built_in_recipes

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


CHOICES = {
    "models": ("train", "models.MODELS"),
    "surrogates": ("train", "surrogates.KINDS"),
    "defences": ("train", "defences.DEFENCES"),
    "data sets": ("train", "data.DATASETS"),
    "attacks": ("export", "attacks.tiers.CONDITIONS"),
    "backends": ("export", "runtime.BACKENDS"),
    "precisions": ("export", "exporting.precision.PRECISIONS"),
    "formats": ("export", "prediction.writers.FORMATS"),
}


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a user can choose, asked of a process of its own: studies and tests register more in theirs."""
    file = tmp_path_factory.mktemp("choices") / "names.json"
    prelude = f"""
import json, pathlib, pkgutil
names = {{
    kind: list(pkgutil.resolve_name("mpdsgr_deploy." + ":".join(place.rsplit(".", 1))))
    for kind, (_, place) in {CHOICES}.items()
}}
pathlib.Path({str(file)!r}).write_text(json.dumps(names))
"""
    done = mpdsgr("--version", prelude=prelude)
    assert done.returncode == 0, done.stderr
    names: dict[str, list[str]] = json.loads(file.read_text())
    return names


@pytest.mark.parametrize("kind", CHOICES)
def test_the_manuals_name_every_choice(kind: str, choices: dict[str, list[str]]) -> None:
    manual = (ROOT / CHOICES[kind][0] / "README.md").read_text()
    blocks = re.compile(r"```.*?```", re.DOTALL)
    code = [*blocks.findall(manual), *re.findall(r"`[^`\n]+`", blocks.sub("", manual))]
    written = {word for part in code for word in WORD.findall(part)}
    assert choices[kind]
    assert sorted(name for name in choices[kind] if name not in written) == []


def fields(section: object) -> list[str]:
    return list(getattr(type(section), "model_fields", {}))


def test_the_manual_lists_every_table_and_study() -> None:
    assert [name for name in built_in_tables() if f"`{name}`" not in MANUAL] == []
    studies = (ROOT / "train" / "studies" / "README.md").read_text()
    assert [name for name in built_in_studies() if f"`{name}`" not in studies] == []
