"""Studies: TOML files in train/studies that name methods and settings, and the table of all their pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mpdsgr_deploy.experiments.table import FileName, Names, RowSpec, TableSpec, TierName, checked, defence_of
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe, shipped
from mpdsgr_deploy.schema import Count, Section, Seed, parse, read_toml

PREFIX = "study-"  # prefix of the names of studies' tables


class StudyMethod(Section):
    """A recipe, changed by `set`. label: what pictures call it; None: its defences."""

    name: FileName
    label: str | None = None
    recipe: FileName
    set: Names = ()


class Setting(Section):
    """A value of a factor: what it changes. methods: which of the study's are run; None: all."""

    factor: str
    name: FileName
    set: Names = ()
    methods: Names | None = None


class Study(Section):
    """Every setting with every method of it. The first method is the baseline, the first setting the base setting.

    `set` changes all recipes. A setting's changes to `defence.NAME` apply to its methods that have this defence, or add
    the defence to all methods if none has it. A setting without the baseline is compared with the base setting's. With
    several seeds, each network is also attacked with the images that fool the baseline's network of the next seed.
    """

    title: str
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)
    limit: Count | None = None
    tier: TierName = "release"
    set: Names = ()
    methods: Annotated[tuple[StudyMethod, ...], Field(strict=False, min_length=1)]
    settings: Annotated[tuple[Setting, ...], Field(strict=False, min_length=1)]

    def methods_of(self, setting: Setting) -> list[StudyMethod]:
        """Return the methods that a setting is run with. Raises InputError for an unknown one."""
        known = {method.name: method for method in self.methods}
        return [choose("method", known, name) for name in setting.methods or known]

    def pairs(self) -> list[tuple[Setting, StudyMethod]]:
        return [(setting, method) for setting in self.settings for method in self.methods_of(setting)]

    def title_of(self, setting: Setting, method: StudyMethod) -> str:
        return f"{setting.name}.{method.name}"

    def chosen(self, names: Sequence[str]) -> list[RowSpec]:
        """Return the table's rows named by setting or SETTING.METHOD, or all. Raises InputError for an unknown name."""
        rows = {row.title: row for row in self.table().rows}
        known = {title: [row] for title, row in rows.items()}
        for setting in self.settings:
            known[setting.name] = [rows[self.title_of(setting, method)] for method in self.methods_of(setting)]
        return [row for name in names for row in choose("setting", known, name)] or [*rows.values()]

    def baseline_of(self, setting: Setting) -> str:
        """Return the title of the row that the methods of a setting are compared with."""
        baseline = self.methods[0]
        own = setting if baseline in self.methods_of(setting) else self.settings[0]
        return self.title_of(own, baseline)

    def table(self) -> TableSpec:
        """Return all runs as the rows of a table. Raises InputError as `checked` does."""
        rows = [self._row(setting, method) for setting, method in self.pairs()]
        table = TableSpec(
            title=self.title, seeds=self.seeds, limit=self.limit, tier=self.tier, set=self.set, rows=tuple(rows)
        )
        return checked(table, self.title)

    def _row(self, setting: Setting, method: StudyMethod) -> RowSpec:
        others = {name for other in self.methods_of(setting) for name in defences_of(other)}
        foreign = others - defences_of(method)
        own = [override for override in setting.set if defence_of(override) not in foreign]
        sender = self.baseline_of(setting) if len(self.seeds) > 1 else None
        title = self.title_of(setting, method)
        return RowSpec(recipe=method.recipe, name=title, set=(*method.set, *own), transfer=sender)


def defences_of(method: StudyMethod) -> set[str | None]:
    """Return the names of the defences in a method's recipe, and of those it adds."""
    return {*load_recipe(find_recipe(method.recipe)).defence, *map(defence_of, method.set)}


def built_in_studies() -> dict[str, Path]:
    """Return the file of every study that ships, by name."""
    return {path.stem: path for path in sorted(shipped("train").glob("studies/*.toml"))}


def load_study(name: str) -> tuple[str, Study]:
    """Load a study, and return it with its table's name. `name` is a file if it ends in .toml, else one that ships.

    Raises InputError for an unknown study or a file with wrong keys or values.
    """
    path = Path(name) if name.endswith(".toml") else choose("study", built_in_studies(), name)
    return f"{PREFIX}{path.stem}", parse(Study, read_toml(path), str(path))
