"""Schedules of MPD-APGD that `tier_strength.py` tries by name, without the other attacks of a release.

    python benchmarks/tier_strength.py runs/digits-reg --tier A --out benchmarks/results/schedules.jsonl

`schedule_table` renders what they left, for `research_page.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mpdsgr_deploy.attacks.mpd_apgd import SCHEDULE, Round, Schedule, Through

RESULTS = Path(__file__).parent / "results" / "schedules.jsonl"


def short(*near: float) -> Schedule:
    """The three rounds of 100 steps that all schedules begin with; near: how near images must have come after each."""
    first, second, third = near
    return (
        Round("sa-pgd", Through(20), 1, first),
        Round("apgd", Through(10, "dlr"), 1, second),
        Round("apgd", Through(20), 1, third, aim=1),
    )


def climb(sharpness: float, length: int, near: float, aim: int | None = None) -> Round:
    """A round of APGD on cross-entropy."""
    return Round("apgd", Through(sharpness), length, near, aim)


MIDDLE = (climb(20, 3, 0.15), climb(20, 3, 0.15, aim=1))
LAST = (climb(20, 9, 0.03, aim=0), climb(20, 9, 0.03, aim=1), climb(30, 9, 0.03))
SCHEDULES: dict[str, Schedule] = {
    "suite 3": (
        *short(0.4, 0.25, 0.25),
        Round("sa-pgd", Through(30), 3, near=0.2),
        climb(20, 3, 0.15),
        Round("apgd", Through(30, "dlr"), 9, near=0.15),
        climb(20, 9, 0.15, aim=1),
        Round("sa-pgd", Through(30), 9, near=0.15),
    ),
    "A": (*short(0.6, 0.3, 0.25), *MIDDLE, climb(50, 9, 0.1), climb(20, 9, 0.1), climb(20, 9, 0.1, aim=0)),
    "B": (*short(0.6, 0.4, 0.25), *MIDDLE, climb(50, 9, 0.1), climb(20, 9, 0.1), *LAST),
    "C": (*short(0.6, 0.4, 0.25), *MIDDLE, climb(50, 9, 0.12), climb(20, 9, 0.08), *LAST),
    "D": SCHEDULE,
}


def schedule_table(lines: list[dict[str, Any]], floors: dict[str, tuple[int, int] | None]) -> str:
    """What each schedule leaves and costs; floors: what the research attack left of each network, by which attempts."""
    names = list(dict.fromkeys(line["network"] for line in lines))
    title = (
        "Schedules of MPD-APGD, without other attacks: images left more than by the research attack, gradients per "
        "image, and how many seeds of random starts both are averaged over:"
    )
    table = [title, "", f"| schedule | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for schedule in dict.fromkeys(line["tier"] for line in lines):
        made = {name: [one for one in lines if (one["network"], one["tier"]) == (name, schedule)] for name in names}
        table.append(f"| {schedule} | {' | '.join(cell(own, floors[name]) for name, own in made.items())} |")
    return "\n".join([*table, ""])


def cell(lines: list[dict[str, Any]], floor: tuple[int, int] | None) -> str:
    """One schedule on one network, from a line per seed."""
    if not lines or floor is None:
        return "-"
    gap = np.mean([sum(line["correct"]) for line in lines]) - floor[0]
    gradients = np.mean([line["evaluations"] / line["n"] for line in lines])
    return f"{gap:+.1f}, {gradients:.0f} ({len(lines)})"
