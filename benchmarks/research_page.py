"""Renders benchmarks/MPD_APGD.md and its plot from what `research.py` and `tier_strength.py` wrote.

python benchmarks/research_page.py
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import research
import schedules
import tier_strength
from matplotlib import rc_context
from matplotlib.figure import Figure

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.surrogates import ADAPTIVE, AVERAGED, RATE

FOLDER = Path(__file__).parent
PAGE, PLOT = FOLDER / "MPD_APGD.md", FOLDER / "results" / "mpd_apgd.svg"
BEGIN, END = "<!-- tables: python benchmarks/research_page.py -->\n", "<!-- end of tables -->\n"
Lines = list[dict[str, Any]]
GROUPED = dict.fromkeys(("averaged", "layers"), "MPD-APGD") | {"early": "APGD, superspike:1"}
FURTHER = "further starts"
SEED = 0  # of random starts, in all tables but that of seeds


@click.command()
def main() -> None:
    """Write the tables into the page, and the plot."""
    attempts, tiers, trials = map(read, (research.RESULTS, tier_strength.RESULTS, schedules.RESULTS))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write_atomic(PAGE, f"{before}{BEGIN}{render(attempts, tiers, trials)}{END}{rest.partition(END)[2]}".encode())
    plot([line for line in attempts if line["portfolio"] == "grid"])


def read(file: Path) -> Lines:
    """The lines of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def render(attempts: Lines, tiers: Lines, trials: Lines) -> str:
    """All tables as Markdown."""
    first = [line for line in tiers if line["seed"] == SEED]
    parts = [
        union_table(attempts, first),
        in_short(attempts, first),
        seed_table(attempts, tiers),
        alone_table(first),
        schedules.schedule_table(trials, {line["network"]: floor(attempts, line["sha256"]) for line in trials}),
        each_table(attempts),
        group_table(attempts),
        source([*attempts, *tiers, *trials]),
        revisions("Attempts", attempts),
        revisions("Conditions of the tiers", tiers),
        revisions("Trials of schedules", trials),
    ]
    return "\n".join(filter(None, parts)) + "\n"


def union_table(attempts: Lines, tiers: Lines) -> str:
    """What every tier's union leaves of a network's images, and the research attack's."""
    lines = [
        "| network | tier | right without attack | MPD-APGD leaves | union leaves | research attack leaves "
        "| gradients per image | queries per image | processor s | times before |",
        "|---" * 10 + "|",
    ]
    spent = seconds_by_tier(tiers)
    for (name, tier), rows in by_tier(tiers).items():
        n = rows[0]["n"]
        own = [row for row in rows if row["condition"] == "mpd-apgd"]
        gradients, queries = (
            sum(row["evaluations"] for row in rows if (row["kind"] == "query") == asked) / n for asked in (False, True)
        )
        cells = [f"{sum(rows[0]['clean'])} of {n}", str(sum(own[0]["correct"])) if own else "-", str(left_by(rows))]
        known = floor(attempts, rows[0]["sha256"])
        cells += [
            f"{known[0]} ({known[1]} attempts)" if known else "-",
            f"{gradients:.0f}",
            f"{queries:.0f}",
            f"{spent[name, tier]:.1f}",
            f"{spent[name, tier] / spent[name, f'{tier}, before']:.2f}" if (name, f"{tier}, before") in spent else "",
        ]
        lines.append(f"| {name} | {tier} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def by_tier(tiers: Lines) -> dict[tuple[str, str], Lines]:
    """The lines of each network and tier."""
    groups: dict[tuple[str, str], Lines] = {}
    for line in tiers:
        groups.setdefault((line["network"], line["tier"]), []).append(line)
    return groups


def seconds_by_tier(tiers: Lines) -> dict[tuple[str, str], float]:
    """Processor seconds of each network and tier."""
    return {key: sum(line["seconds"] for line in rows) for key, rows in by_tier(tiers).items()}


def alone_table(tiers: Lines) -> str:
    """What MPD-APGD breaks that no other condition of its tier breaks, and the others likewise, with their cost."""
    lines = ["Images that one condition of a tier breaks and no other, and processor seconds:", ""]
    lines += [
        "| network | tier | MPD-APGD alone | any other alone, at most | MPD-APGD, s | Square, s | all others, s |"
    ]
    lines += ["|---" * 7 + "|"]
    for (name, tier), of_tier in by_tier(tiers).items():
        rows = {line["condition"]: line for line in of_tier}
        if "mpd-apgd" not in rows:
            continue
        right = np.array([row["clean"] for row in rows.values()]) & np.array([row["correct"] for row in rows.values()])
        breaks = np.array([row["clean"] for row in rows.values()]) & ~right
        alone = dict(zip(rows, (breaks & (breaks.sum(0) == 1)).sum(1), strict=True))
        seconds = {condition: row["seconds"] for condition, row in rows.items()}
        own, searched = (seconds.pop(condition) for condition in ("mpd-apgd", "square"))
        cells = [name, tier, alone.pop("mpd-apgd"), max(alone.values()), own, searched, f"{sum(seconds.values()):.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def left_by(rows: Lines) -> int:
    """How many images all conditions of a tier leave."""
    return int(np.logical_and.reduce([row["clean"] for row in rows] + [row["correct"] for row in rows]).sum())


def floor(attempts: Lines, sha256: str) -> tuple[int, int] | None:
    """How many images all attempts of the research attack left, and how many attempts there were; None without any."""
    made = [line for line in attempts if line["sha256"] == sha256 and line["portfolio"] == "research"]
    return (len(set.intersection(*(set(line["left"]) for line in made))), len(made)) if made else None


def in_short(attempts: Lines, tiers: Lines) -> str:
    """How far a release stays above the research attack, and how much longer it takes than before, in sentences."""
    groups = by_tier(tiers)
    networks = [name for name, tier in groups if tier == "release"]
    above = {}
    for name in networks:
        rows = groups[name, "release"]
        if known := floor(attempts, rows[0]["sha256"]):
            above[name] = left_by(rows) - known[0]
    spent = seconds_by_tier(tiers)
    times = {name: spent[name, "release"] / spent[name, "release, before"] for name in networks}
    together = sum(spent[name, "release"] for name in networks) / sum(spent[n, "release, before"] for n in networks)
    mean = f"{np.mean([*above.values()]):+.1f} on average" if above else ""
    gaps = ", ".join([mean, *(f"{name} {gap:+d}" for name, gap in above.items())])
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in times.items())
    return (
        f"Images that a release leaves more than the research attack: {gaps}. Its time relative to that of before: "
        f"{together:.2f} over all networks; {ratios}.\n"
    )


def seed_table(attempts: Lines, tiers: Lines) -> str:
    """What a release leaves and takes with other random starts, of networks that were attacked with several."""
    lines = ["What a release leaves with random starts of other seeds, its cost, and its time relative to before:", ""]
    head = ["network", "seeds", "leaves", "on average", "all seeds together leave", "research attack leaves"]
    head += ["gradients per image", "processor s", "times before, over all seeds"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    gaps = {}
    for name in dict.fromkeys(line["network"] for line in tiers):
        releases, earlier = ([*by_seed(tiers, name, tier).values()] for tier in ("release", "release, before"))
        if len(releases) < 2:
            continue
        left = [left_by(rows) for rows in releases]
        every = [row for rows in releases for row in rows]
        n, known = every[0]["n"], floor(attempts, every[0]["sha256"])
        gaps[name] = np.mean(left) - known[0] if known else np.nan
        spent, before = (sum(row["seconds"] for rows in runs for row in rows) for runs in (releases, earlier))
        gradients = sum(row["evaluations"] for row in every if row["kind"] != "query")
        cells = [name, f"{len(releases)}", ", ".join(map(str, left)), f"{np.mean(left):.1f}", f"{left_by(every)}"]
        cells += [str(known[0]) if known else "-", f"{gradients / n / len(releases):.0f}"]
        cells += [f"{spent / len(releases):.1f}", f"{spent / before:.2f}" if len(earlier) == len(releases) else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    more = ", ".join(f"{name} {gap:+.1f}" for name, gap in gaps.items())
    lines += ["", f"Images that a release leaves more than the research attack, on average over seeds: {more}."]
    return "\n".join([*lines, ""]) if gaps else ""


def by_seed(tiers: Lines, network: str, tier: str) -> dict[int, Lines]:
    """The lines of a network and tier by the seed of their random starts."""
    groups: dict[int, Lines] = {}
    for line in tiers:
        if (line["network"], line["tier"]) == (network, tier):
            groups.setdefault(line["seed"], []).append(line)
    return groups


def each_table(attempts: Lines) -> str:
    """What each kind of attempt breaks of the images that the first of them left."""
    made = [line for line in attempts if line["portfolio"] in ("each", "tails")]
    if not made:
        return ""
    lines = ["What each kind of attempt breaks of the images that the first of them left:", ""]
    lines += ["| network | attempt, 100 steps | breaks | per 1,000 gradients |", "|---" * 4 + "|"]
    for line in made:
        broken, kind = len(line["before"]) - len(line["left"]), research.Attempt(**line["attempt"])
        aimed = "" if kind.wrong is None else f", aimed at wrong class {kind.wrong + 1}"
        share = f" of share {kind.share:g}" if line["portfolio"] == "tails" and kind.surrogate == ADAPTIVE else ""
        what = f"{kind.method} {kind.surrogate}{share}, {kind.loss.upper()}{aimed}"
        rate = 1000 * broken / max(line["gradients"], 1)
        lines.append(
            f"| {line['network']}, n = {line['n']} | {what} | {broken} of {len(line['before'])} | {rate:.2f} |"
        )
    return "\n".join([*lines, ""])


def group_table(attempts: Lines) -> str:
    """What groups of attempts break together, beside as many further starts, of what each portfolio's first left."""
    lines = ["What groups of attempts of 100 steps break together, beside further starts of the ordinary kind:", ""]
    head = ["network", "n", "on what was left by", "attempts", "break together"]
    head += ["of these not broken by further starts"]
    head += ["by further starts alone", "strongest attempt breaks", "gradients"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for network, portfolio in dict.fromkeys((a["network"], a["portfolio"]) for a in attempts):
        if portfolio not in GROUPED:
            continue
        made = [a for a in attempts if (a["network"], a["portfolio"]) == (network, portfolio)]
        first, others = made[0], made[1:]
        before = set(first["left"])
        groups = {group(line): [one for one in others if group(one) == group(line)] for line in others}
        control = broken(groups[FURTHER])
        for name, members in groups.items():
            own = broken(members)
            alone = max(len(broken([one])) for one in members)
            paired = ["", ""] if name == FURTHER else [len(own - control), len(control - own)]
            cells = [network, first["n"], GROUPED[portfolio], f"{len(members)} {name}", f"{len(own)} of {len(before)}"]
            cells += [*paired, alone, sum(one["gradients"] for one in members)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""]) if len(lines) > 4 else ""


def group(line: dict[str, Any]) -> str:
    """The group that an attempt belongs to."""
    attempt = research.Attempt(**line["attempt"])
    if attempt.layer is not None:
        return "with a layer 3 times as sharp, or a third"
    return "with gradients averaged over time" if attempt.surrogate.endswith((AVERAGED, RATE)) else FURTHER


def broken(lines: Lines) -> set[int]:
    """The images that some of these attempts break."""
    return {place for line in lines for place in set(line["before"]) - set(line["left"])}


def source(lines: Iterable[dict[str, Any]]) -> str:
    """Where the figures come from."""
    places = {
        f"{made['hardware']['cores']} cores of {made['hardware']['cpu']}, onnxruntime {made['packages']['onnxruntime']}"
        for made in (line["provenance"] for line in lines)
    }
    return f"{'; '.join(sorted(places))}; one thread, seconds of processor time on a machine with other work."


def revisions(what: str, lines: Lines) -> str:
    """The revisions that lines were measured with, and what stands in the history for those that do not."""
    rows: dict[tuple[str, str, str], int] = {}
    for made in (line["provenance"] for line in lines):
        revision = made["revision"]
        key = (
            shortened(revision) if revision else "none",
            made.get("on_main", "")[:12],
            made.get("on_main_differs", ""),
        )
        rows[key] = rows.get(key, 0) + 1
    table = ["", f"| {what} | measured with revision | stands for it in the history | because |", "|---" * 4 + "|"]
    return "\n".join([*table, *(f"| {n} | {' | '.join(key)} |" for key, n in rows.items())])


def shortened(revision: str) -> str:
    """Twelve digits of a revision, and whether files had been changed after it."""
    sha, dirty, _ = revision.partition("+dirty")
    return sha[:12] + dirty


def plot(grid: Lines) -> None:
    """Images left against sharpness, a line per number of steps, a panel per network."""
    networks = list(dict.fromkeys(line["network"] for line in grid))
    if not networks:
        return
    figure = Figure(figsize=(4.5 * len(networks), 3.4), layout="constrained")
    for axes, network in zip(np.atleast_1d(figure.subplots(1, len(networks))), networks, strict=True):
        mine = [(research.Attempt(**line["attempt"]), line) for line in grid if line["network"] == network]
        for steps in sorted({attempt.steps for attempt, _ in mine}):
            points = sorted((float(a.surrogate.split(":")[1]), len(b["left"])) for a, b in mine if a.steps == steps)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{steps} steps")
        axes.set(xscale="log", xlabel="sharpness k", ylabel="images left", title=f"{network}, n = {mine[0][1]['n']}")
        axes.legend()
    with rc_context({"svg.hashsalt": PLOT.name}):  # the same file for the same lines
        figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
