"""The gate: how much worse than its reference an artefact may be. A TOML file, all keys optional."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Section, UnitInterval, parse

if TYPE_CHECKING:
    from mpdsgr_deploy.validation.report import Row


class Gate(Section):
    """Shares of the images compared, in [0, 1].

    max_newly_wrong: images the reference classifies correctly and the artefact does not, in each condition. Paired,
    so that a percentage point is a count of images and not the difference of two noisy figures.
    min_clean, min_attacked: floors for the artefact, clean and in the worst case over all attacks.
    """

    max_newly_wrong: UnitInterval = 0.01
    min_clean: UnitInterval | None = None
    min_attacked: UnitInterval | None = None

    def failures(self, rows: "list[Row]") -> list[str]:
        """One line for each rule the artefact breaks."""
        found = [
            f"{row.name}: {row.flips.newly_wrong} of {row.n} images newly wrong, {self.max_newly_wrong:.2%} allowed"
            for row in rows
            if row.flips.newly_wrong > self.max_newly_wrong * row.n
        ]
        for name, floor in (("clean", self.min_clean), ("worst", self.min_attacked)):
            (row,) = (row for row in rows if row.name == name)
            if floor is not None and row.artefact.accuracy < floor:
                found.append(f"{name}: accuracy {row.artefact.accuracy:.2%} is below the floor {floor:.2%}")
        return found


def load_gate(path: Path | None) -> Gate:
    """Read a gate file; the defaults without one. Raises InputError for a missing file or an unknown key."""
    if path is None:
        return Gate()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read gate {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    gate: Gate = parse(Gate, values, str(path))
    return gate
