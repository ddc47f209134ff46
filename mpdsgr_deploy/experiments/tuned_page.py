"""The section of a table's page about fine-tuning: each defence or encoding against none, from the same weights."""

from mpdsgr_deploy.attacks.condition import CLEAN, FGSM, GAUSSIAN, PGD, SQUARE, STRONG, WORST
from mpdsgr_deploy.experiments.compare import difference
from mpdsgr_deploy.experiments.page_parts import markdown
from mpdsgr_deploy.experiments.records import Measured, Record

HEADINGS = {CLEAN: CLEAN, GAUSSIAN: GAUSSIAN, FGSM: "FGSM", STRONG: "strong", SQUARE: SQUARE, WORST: "union"}

UNDEFENDED_ENCODINGS = {"direct", "frames"}


def against_none(measured: Measured) -> str:
    """Show what a defence or an encoding gains in fine-tuning over fine-tuning without; empty without such rows."""
    pairs = {
        title: (records, other)
        for title, records in measured.items()
        if is_defended(records[0]) and (other := undefended(measured, records[0])) is not None
    }
    if not pairs:
        return ""
    met = [names(records) & names(other) for records, other in pairs.values()]
    conditions = [name for name in next(iter(pairs.values()))[0][0].attacked.conditions if all(name in m for m in met)]
    columns = {name: HEADINGS.get(name, name.replace(PGD, "PGD")) for name in conditions if is_shown(name)}
    rows = [
        [title, *(str(difference(records, other, name)) for name in columns)]
        for title, (records, other) in pairs.items()
    ]
    note = (
        "Points of accuracy more than the row that started from the same weights without a defence, paired by image "
        "and seed [95 % interval for the choice of images]. PGD is in the paper's setting; with an eps behind it, its "
        "steps are smaller by the same factor."
    )
    table = markdown(["row", *columns.values()], rows)
    return f"## What a defence or an encoding adds in fine-tuning\n\n{table}\n\n{note}"


def undefended(measured: Measured, record: Record) -> list[Record] | None:
    """Return the row without a defence that started from the same weights as `record`; None if there is none."""
    if record.init is None:
        return None
    same = (own for own in measured.values() if own[0].init == record.init and not is_defended(own[0]))
    return next(same, None)


def is_defended(record: Record) -> bool:
    """Whether a network has a defence, or an encoding that noise or filters make one."""
    return bool(record.recipe.defence) or record.recipe.encoding.name not in UNDEFENDED_ENCODINGS


def names(records: list[Record]) -> set[str]:
    return set.intersection(*(set(record.attacked.conditions) for record in records))


def is_shown(condition: str) -> bool:
    """Whether a condition is shown: PGD within any eps, and the conditions that have a heading."""
    return condition in HEADINGS or condition.split()[0] == PGD
