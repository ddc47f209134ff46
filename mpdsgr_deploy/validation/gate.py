"""The gate: how much worse than its reference an artefact may be. A TOML file, all keys optional."""

from pathlib import Path

from mpdsgr_deploy.schema import Section, UnitInterval, parse, read_toml
from mpdsgr_deploy.validation.rows import Row


class Gate(Section):
    """Shares of the images compared, in [0, 1].

    max_newly_wrong: images the reference classifies correctly and the artefact does not, in each condition. Paired,
    so that a percentage point is a count of images and not the difference of two noisy figures.
    min_clean, min_attacked: floors for the artefact, clean and in the worst case over all attacks.
    """

    max_newly_wrong: UnitInterval = 0.01
    min_clean: UnitInterval | None = None
    min_attacked: UnitInterval | None = None

    def failures(self, rows: list[Row]) -> list[str]:
        """One line for each rule the artefact breaks."""
        found = [
            f"{row.name}: {row.flips.newly_wrong} of {row.n} images newly wrong, {self.max_newly_wrong:.2%} allowed"
            for row in rows
            if row.flips is not None and row.flips.newly_wrong > self.max_newly_wrong * row.n
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
    gate: Gate = parse(Gate, read_toml(path), str(path))
    return gate
