"""Tables: TOML files in train/tables that name recipes as rows, what all rows change, and the seeds."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mpdsgr_deploy.attacks.condition import PGD
from mpdsgr_deploy.attacks.tiers import TierEntry, entry
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import Attack, Gate, Recipe, load_recipe
from mpdsgr_deploy.recipes import find_recipe, shipped
from mpdsgr_deploy.schema import Count, NonNegative, Number, Section, Seed, UnitInterval, parse, read_toml

TITLE = r"^\w[\w.+-]*$"
FileName = Annotated[str, Field(pattern=TITLE)]
TierName = Literal["commit", "release", "paper"]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # TOML has lists only
Eps = Annotated[Number, Field(gt=0, le=1)]


class RowSpec(Section):
    """A recipe. `set` changes it for this row alone, which then needs a `name` of its own.

    init: title of a row from whose network of the same seed training starts, instead of random weights. transfer: title
    of a row. Its network of the table's next seed is attacked, and those images are tried on this one.
    """

    recipe: FileName
    name: FileName | None = None
    set: Names = ()
    init: FileName | None = None
    transfer: FileName | None = None

    @property
    def title(self) -> str:
        """What the row is called on the page and in the records."""
        return self.name or self.recipe


class ExportSpec(Section):
    """How the exported networks of a table are attacked: the gate's tier and drop, for each of the precisions.

    membranes: a defence. The page draws the membrane potentials of the rows with it beside those of rows without any.
    """

    tier: TierName = "release"
    precisions: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("fp32",)
    max_drop: UnitInterval | None = None
    membranes: str | None = None

    @property
    def gate(self) -> Gate:
        """The rules that each exported network has to keep."""
        return Gate(tier=self.tier, max_drop=self.max_drop)


class TableSpec(Section):
    """Rows that are compared with one another.

    `set` changes the recipes of all rows, as `section.key=value`; an entry `defence.NAME.key=value` concerns the rows
    that have this defence, and does not give it to the others. `limit` is the number of test images; None: all. With
    `artefact` the networks are exported and the exported ones are attacked; without, the torch networks, under a `tier`
    of the gate or else as the recipes say, and by PGD in the paper's setting within each of `eps` too. With
    `eta_budget` the rows are a sweep of MPD-SGR's eta: the page names the largest that costs at most so many points of
    clean accuracy on the validation split.
    """

    title: str
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)
    set: Names = ()
    limit: Count | None = None
    tier: TierName | None = None
    eps: Annotated[tuple[Eps, ...], Field(strict=False)] = ()
    artefact: ExportSpec | None = None
    eta_budget: NonNegative | None = None
    rows: Annotated[tuple[RowSpec, ...], Field(strict=False, min_length=1)]

    def row(self, title: str) -> RowSpec:
        """The row of that title. Raises InputError that lists all titles."""
        return choose("row", {row.title: row for row in self.rows}, title)

    def overrides(self, row: RowSpec) -> list[str]:
        """What the table and the row change in the row's recipe."""
        defences = load_recipe(find_recipe(row.recipe)).defence
        limit = [] if self.limit is None else [f"validation.limit={self.limit}"]
        return [*(o for o in self.set if defence_of(o) in (None, *defences)), *limit, *row.set]

    def recipe(self, row: RowSpec, seed: int) -> Recipe:
        """What a row trains and how it is attacked, with all defaults written out.

        Raises InputError for an unknown recipe, key or defence, and for a value out of range.
        """
        from mpdsgr_deploy.defences import resolved

        overrides = [*self.overrides(row), f"training.seed={seed}"]
        return resolved(load_recipe(find_recipe(row.recipe), overrides)).portable()

    def pgd_within(self, attack: Attack) -> list[TierEntry]:
        """PGD in the paper's setting within each of `eps`, its steps smaller (or larger) by the same factor."""
        step = attack.step / attack.eps
        return [entry("pgd", f"{PGD} {255 * eps:.3g}/255", eps=eps, step=eps * step) for eps in self.eps]

    def source(self, row: RowSpec, seed: int) -> tuple[RowSpec, Recipe] | None:
        """The row whose network's attacked images are tried too, and what it trains; None without transfer."""
        if row.transfer is None:
            return None
        other = self.row(row.transfer)
        later = [number for number in self.seeds if number > seed] or self.seeds
        return other, self.recipe(other, later[0])


def defence_of(override: str) -> str | None:
    """NAME of `defence.NAME.key=value`; None for an override of another section."""
    section, *rest = override.partition("=")[0].strip().split(".")
    return rest[0] if section == "defence" and rest else None


def built_in_tables() -> dict[str, Path]:
    """Name to file of every table that ships."""
    return {path.stem: path for path in sorted(shipped("train").glob("tables/*.toml"))}


def load_table(name: str) -> tuple[str, TableSpec]:
    """A table and its name: a file if `name` ends in .toml, else one that ships.

    Raises InputError for an unknown table, and as `checked`.
    """
    path = Path(name) if name.endswith(".toml") else choose("table", built_in_tables(), name)
    table: TableSpec = parse(TableSpec, read_toml(path), str(path))
    return path.stem, checked(table, str(path))


def checked(table: TableSpec, source: str) -> TableSpec:
    """The table itself.

    Raises InputError for row titles that are not unique, an override that concerns no row, a row that starts from one
    that is not there or itself starts from another, or a transfer between networks that are not there or not two.
    """
    titles = [row.title for row in table.rows]
    if repeated := {title for title in titles if titles.count(title) > 1}:
        raise InputError(f"{source}: rows {', '.join(sorted(repeated))} appear twice; give each a name of its own")
    used = {override for row in table.rows for override in table.overrides(row)}
    if unused := [override for override in table.set if override not in used]:
        raise InputError(f"{source}: no row has the defence that {', '.join(unused)} changes")
    if chained := [row.title for row in table.rows if row.init and table.row(row.init).init]:
        raise InputError(f"{source}: {', '.join(chained)} would start from a row with an init of its own")
    senders = [table.row(row.transfer) for row in table.rows if row.transfer is not None]
    if senders and len(set(table.seeds)) < 2:
        raise InputError(f"{source}: transfer is between networks of two seeds, and the table has one; give it another")
    if senders and table.artefact is not None:
        raise InputError(f"{source}: transfer attacks torch's networks; leave out transfer or [artefact]")
    if table.eps and table.artefact is not None:
        raise InputError(f"{source}: eps is for attacks on torch's networks; leave out eps or [artefact]")
    return table
