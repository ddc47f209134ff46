"""Studies: TOML files in train/studies that name methods and settings; a study is the table of all their pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mpdsgr_deploy.experiments.table import FileName, Names, RowSpec, TableSpec, TierName, checked, defence_of
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import load_recipe
from mpdsgr_deploy.recipes import find_recipe, shipped
from mpdsgr_deploy.schema import Count, Section, Seed, parse, read_toml

PREFIX = "study-"  # begins the names of the tables of studies


class StudyMethod(Section):
    """A recipe, changed by `set`. label: its name in pictures; None: the names of its defences."""

    name: FileName
    label: str | None = None
    recipe: FileName
    set: Names = ()


class Setting(Section):
    """One value of a factor, which changes recipes by `set`. methods: names of those that are run; None: all."""

    factor: str
    name: FileName
    set: Names = ()
    methods: Names | None = None


class Study(Section):
    """Every setting with each of its methods. The first method is the baseline, and the first setting the base setting.

    `set` changes all recipes. A setting's change of `defence.NAME` applies to the methods of the setting that have this
    defence; if none has it, all methods get it. The methods of a setting without the baseline are compared with the
    baseline in the base setting. With several seeds, each network is also attacked with images that fool the baseline's
    network of the next seed. seeds, limit: see `TableSpec`. tier: states the attacks.
    """

    title: str
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)
    limit: Count | None = None
    tier: TierName = "release"
    set: Names = ()
    methods: Annotated[tuple[StudyMethod, ...], Field(strict=False, min_length=1)]
    settings: Annotated[tuple[Setting, ...], Field(strict=False, min_length=1)]

    def methods_of(self, setting: Setting) -> list[StudyMethod]:
        """Return the methods that are run in a setting. Raises InputError for an unknown name."""
        known = {method.name: method for method in self.methods}
        return [choose("method", known, name) for name in setting.methods or known]

    def pairs(self) -> list[tuple[Setting, StudyMethod]]:
        return [(setting, method) for setting in self.settings for method in self.methods_of(setting)]

    def title_of(self, setting: Setting, method: StudyMethod) -> str:
        return f"{setting.name}.{method.name}"

    def chosen(self, names: Sequence[str]) -> list[RowSpec]:
        """Return the table's rows that `names` select, or all rows for none.

        A name is a setting, which selects all of its rows, or SETTING.METHOD. Raises InputError for an unknown name.
        """
        rows = {row.title: row for row in self.table().rows}
        known = {title: [row] for title, row in rows.items()}
        for setting in self.settings:
            known[setting.name] = [rows[self.title_of(setting, method)] for method in self.methods_of(setting)]
        return [row for name in names for row in choose("setting", known, name)] or [*rows.values()]

    def baseline_of(self, setting: Setting) -> str:
        """Return the title of the row with which the methods of a setting are compared."""
        baseline = self.methods[0]
        compared_in = setting if baseline in self.methods_of(setting) else self.settings[0]
        return self.title_of(compared_in, baseline)

    def table(self) -> TableSpec:
        """Return the table whose rows are all pairs. Raises InputError as `checked` does."""
        rows = [self._row(setting, method) for setting, method in self.pairs()]
        table = TableSpec(
            title=self.title, seeds=self.seeds, limit=self.limit, tier=self.tier, set=self.set, rows=tuple(rows)
        )
        return checked(table, self.title)

    def _row(self, setting: Setting, method: StudyMethod) -> RowSpec:
        others = {name for other in self.methods_of(setting) for name in defences_of(other)}
        foreign = others - defences_of(method)
        overrides = [override for override in setting.set if defence_of(override) not in foreign]
        sender = self.baseline_of(setting) if len(self.seeds) > 1 else None
        title = self.title_of(setting, method)
        return RowSpec(recipe=method.recipe, name=title, set=(*method.set, *overrides), transfer=sender)


def defences_of(method: StudyMethod) -> set[str | None]:
    """Return the names of the defences in a method's recipe and in its changes; None stands for other changes."""
    return {*load_recipe(find_recipe(method.recipe)).defence, *map(defence_of, method.set)}


def built_in_studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted(shipped("train").glob("studies/*.toml"))}


def load_study(name: str) -> tuple[str, Study]:
    """Return the name of a study's table, and the study. name: a file if it ends in .toml, else a study that ships.

    Raises InputError for an unknown study, and for a file that is missing or has wrong keys or values.
    """
    path = Path(name) if name.endswith(".toml") else choose("study", built_in_studies(), name)
    return f"{PREFIX}{path.stem}", parse(Study, read_toml(path), str(path))
