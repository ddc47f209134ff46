"""Tables: TOML files in train/tables that name recipes as rows, changes to all rows, and seeds."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mpdsgr_deploy.attacks.condition import PGD
from mpdsgr_deploy.attacks.tiers import TierEntry, entry, suite_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.recipe import Attack, Recipe, load_recipe
from mpdsgr_deploy.recipes import find_recipe, shipped
from mpdsgr_deploy.schema import Count, NonNegative, Number, Section, Seed, UnitInterval, parse, read_toml

TITLE = r"^\w[\w.+-]*$"
FileName = Annotated[str, Field(pattern=TITLE)]
TierName = Literal["commit", "release", "paper"]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # TOML has lists but no tuples
Eps = Annotated[Number, Field(gt=0, le=1)]


class RowSpec(Section):
    """A row: a recipe, which `set` changes for this row alone. name: the row's title; None: that of the recipe.

    init: title of the row whose network of the same seed training starts from, in place of random weights. transfer:
    title of a row whose network of the table's next seed is attacked; these images are tried on the row's own network.
    """

    recipe: FileName
    name: FileName | None = None
    set: Names = ()
    init: FileName | None = None
    transfer: FileName | None = None

    @property
    def title(self) -> str:
        return self.name or self.recipe


class ExportSpec(Section):
    """How the exported networks of a table are validated: precisions, tier, and the gate's max_drop.

    membranes: the name of a defence; the page plots membrane potentials of rows with and without it.
    """

    tier: TierName = "release"
    precisions: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("fp32",)
    max_drop: UnitInterval | None = None
    membranes: str | None = None


class TableSpec(Section):
    """A table of rows that are compared with one another.

    set: changes to the recipes of all rows, as `section.key=value`; `defence.NAME.key=value` applies only to rows that
    have this defence. limit: number of test images; None: the recipes'. artefact: export the networks, and attack the
    exported ones; None: attack the torch networks, with the attacks of `tier` (None: those that the recipes name), and
    with PGD in the paper's setting within each of `eps`. eta_budget: the rows are a sweep over MPD-SGR's eta, and the
    page names the largest eta that costs at most this many points of clean accuracy on validation images. start_seed:
    the only seed of the rows without `init`, so that all seeds of the other rows start from the same networks; None:
    every seed starts from the network of the same seed.
    """

    title: str
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)
    start_seed: Seed | None = None
    set: Names = ()
    limit: Count | None = None
    tier: TierName | None = None
    eps: Annotated[tuple[Eps, ...], Field(strict=False)] = ()
    artefact: ExportSpec | None = None
    eta_budget: NonNegative | None = None
    rows: Annotated[tuple[RowSpec, ...], Field(strict=False, min_length=1)]

    @property
    def suite(self) -> int:
        """The version of the attacks that are made on its networks."""
        return suite_of(self.tier if self.artefact is None else self.artefact.tier)

    def row(self, title: str) -> RowSpec:
        """Return the row of that title. Raises InputError, which lists all titles, if there is none."""
        return choose("row", {row.title: row for row in self.rows}, title)

    def overrides(self, row: RowSpec) -> list[str]:
        """Return all changes to a row's recipe: the table's, the number of test images, and the row's own."""
        defences = load_recipe(find_recipe(row.recipe)).defence
        limit = [] if self.limit is None else [f"validation.limit={self.limit}"]
        return [*(o for o in self.set if defence_of(o) in (None, *defences)), *limit, *row.set]

    def recipe(self, row: RowSpec, seed: int) -> Recipe:
        """Return the recipe of a row for training and attacks, with the settings of defences resolved.

        Raises InputError for an unknown recipe, key or defence, and for a value out of range.
        """
        from mpdsgr_deploy.defences import resolved

        overrides = [*self.overrides(row), f"training.seed={seed}"]
        return resolved(load_recipe(find_recipe(row.recipe), overrides)).portable()

    def pgd_within(self, attack: Attack) -> list[TierEntry]:
        """Return PGD in the paper's setting within each of `eps`, with the step size in proportion to eps."""
        step = attack.step / attack.eps
        return [entry("pgd", f"{PGD} {255 * eps:.3g}/255", eps=eps, step=eps * step) for eps in self.eps]

    def seed_of(self, row: RowSpec, seed: int) -> int:
        """Return the seed to train a row with where the rest of the table has `seed`."""
        return self.start_seed if self.start_seed is not None and row.init is None else seed

    def seeds_of(self, row: RowSpec) -> list[int]:
        """Return the seeds that a row is trained with, in ascending order."""
        return sorted({self.seed_of(row, seed) for seed in self.seeds})

    def next_seed(self, seed: int) -> int:
        """Return the seed after `seed`; the last one is followed by the first."""
        return next((number for number in self.seeds if number > seed), self.seeds[0])


def defence_of(override: str) -> str | None:
    """Return NAME of `defence.NAME.key=value`; None for an override of another section."""
    section, *rest = override.partition("=")[0].strip().split(".")
    return rest[0] if section == "defence" and rest else None


def built_in_tables() -> dict[str, Path]:
    return {path.stem: path for path in sorted(shipped("train").glob("tables/*.toml"))}


def load_table(name: str) -> tuple[str, TableSpec]:
    """Return a table's name, and the table. name: a file if it ends in .toml, else a table that ships.

    Raises InputError for an unknown table or a file that is missing or has wrong keys or values, and as `checked` does.
    """
    path = Path(name) if name.endswith(".toml") else choose("table", built_in_tables(), name)
    return path.stem, checked(parse(TableSpec, read_toml(path), str(path)), str(path))


def checked(table: TableSpec, source: str) -> TableSpec:
    """Check a table and return it. source: what error messages call the table.

    Raises InputError for two rows of one title, a change that applies to no row, an `init` or `transfer` that names no
    row, a row that starts from its own result, a `start_seed` without any `init`, a transfer from a row with fewer than
    two seeds, and `transfer` or `eps` together with `artefact`.
    """
    titles = [row.title for row in table.rows]
    if repeated := {title for title in titles if titles.count(title) > 1}:
        raise InputError(f"{source}: rows {', '.join(sorted(repeated))} appear twice; give each row another title")
    used = {override for row in table.rows for override in table.overrides(row)}
    if unused := [override for override in table.set if override not in used]:
        raise InputError(f"{source}: {', '.join(unused)} changes a defence that no row has; leave it out")
    if table.start_seed is not None and all(row.init is None for row in table.rows):
        raise InputError(f"{source}: start_seed is for rows that start from others, and no row has init; leave it out")
    if circular := [row.title for row in table.rows if starts_from_itself(table, row)]:
        raise InputError(
            f"{source}: {', '.join(circular)} would start from weights that depend on its own result; change `init`"
        )
    senders = [table.row(row.transfer) for row in table.rows if row.transfer is not None]
    if single := [sender.title for sender in senders if len(table.seeds_of(sender)) < 2]:
        where = "the table" if len(set(table.seeds)) < 2 else f"{single[0]}, for which start_seed is set,"
        raise InputError(f"{source}: transfer attacks need networks of two seeds, and {where} has one; add a seed")
    if senders and table.artefact is not None:
        raise InputError(f"{source}: transfer attacks only torch networks; leave out transfer or [artefact]")
    if table.eps and table.artefact is not None:
        raise InputError(f"{source}: eps applies only to attacks on torch networks; leave out eps or [artefact]")
    return table


def starts_from_itself(table: TableSpec, row: RowSpec) -> bool:
    """Whether the chain of rows that a row starts from comes to one of its rows for the second time."""
    visited: set[str] = set()
    while row.init is not None and row.title not in visited:
        visited.add(row.title)
        row = table.row(row.init)
    return row.title in visited
