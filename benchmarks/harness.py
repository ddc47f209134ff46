"""How every benchmark takes turns, summarises, publishes and renders; the scripts say only what is measured.

Brackets hold an interval of the median: the k-th smallest to the k-th largest sample, k as large as 95 % allow.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import click
import torch

from mpdsgr_deploy.provenance import provenance

FOLDER, PAGE, RESULTS = (Path(__file__).parent / name for name in (".", "README.md", "results"))
MANUAL = FOLDER.parent / "export" / "README.md"  # which shows these tables:
IN_THE_MANUAL = ("steps", "early_exit")
Contenders, Result = Mapping[str, Callable[[], Any]], dict[str, Any]


def take_turns(each: Contenders, turns: int, *, warm_up: int = 1, seconds: float = 0) -> dict[str, list[Any]]:
    """Samples of each: `turns` or more, until `seconds` have passed, in an order that rotates against disturbances."""
    names, taken, deadline = list(each), list[dict[str, Any]](), 0.0
    while len(taken) < warm_up + turns or clock() < deadline:
        deadline = clock() + seconds if len(taken) == warm_up else deadline
        first = (len(taken) - warm_up) % len(names)
        taken.append({name: each[name]() for name in names[first:] + names[:first]})
    return {name: [samples[name] for samples in taken[warm_up:]] for name in names}


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, with the work that it queued on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    started = clock()
    call()
    wait()
    return round(clock() - started, 7)


def interval(n: int) -> tuple[int, float]:
    """k - 1 for n samples, and the probability that their interval covers the median: below 95 % for fewer than six."""
    covers = [1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    return max(((k, share) for k, share in enumerate(covers) if share >= 0.95), default=(0, covers[0]))


def spread(values: Sequence[float], below: Sequence[float] | None = None, form: str = "{:.2f}") -> str:
    """Median and interval of the values, or of their ratios to `below` in the same turn; one value has no interval."""
    ordered = sorted(values if below is None else [a / b for a, b in zip(values, below, strict=True)])
    if len(ordered) == 1:
        return form.format(ordered[0])
    k, _ = interval(len(ordered))
    return "{} [{}, {}]".format(*(form.format(v) for v in (statistics.median(ordered), ordered[k], ordered[-1 - k])))


def paired(n: int, what: str = "turns") -> str:
    """What the brackets of `spread` are, for n of them."""
    return f"median [{interval(n)[1]:.0%} interval] of n = {n} paired {what}"


def table(header: Sequence[str], rows: Iterable[Iterable[object]], *notes: str) -> str:
    """A Markdown table with notes below."""
    head, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *body, "", *notes, ""])


def source(result: Result) -> str:
    """Where a result comes from, in one line."""
    origin, machine = result["provenance"], result["provenance"]["hardware"]
    device = " + ".join([f"{machine['cores']} cores of {machine['cpu']}", *machine.get("gpus", [])])
    commit, plus, dirty = (origin["revision"] or "unknown").partition("+")
    revision, day = commit[:12] + plus + dirty, origin["created"][:10]
    return f"{device}; torch {origin['packages']['torch']}; revision {revision}; {day}."


def load(name: str) -> Result:
    """The result that benchmarks/NAME.py wrote."""
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def with_earlier(name: str, networks: Sequence[Result]) -> list[Result]:
    """The networks in the results of benchmarks/NAME.py, with these in place of those of the same name."""
    known = load(name)["networks"] if (RESULTS / f"{name}.json").exists() else []
    return [*({one["name"]: one for one in (*known, *networks)}.values())]


def page(name: str, body: str | None = None) -> str:
    """The table of benchmarks/NAME.py in the page; `body` replaces it."""
    file = MANUAL if name in IN_THE_MANUAL else PAGE
    begin, end = f"<!-- table: python benchmarks/{name}.py -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = file.read_text().partition(begin)
    shown, _, after = rest.partition(end)
    if body is not None:
        file.write_text(f"{before}{begin}{body}{end}{after}")
    return shown


def command(name: str, measure: Callable[..., Result], render: Callable[[Result], str]) -> click.Command:
    """The command line of benchmarks/NAME.py, with the options of `measure`."""

    @functools.wraps(measure)
    def run(mode: str, **options: Any) -> None:
        result = load(name) if mode == "render" else {**measure(**options), "provenance": provenance()}
        if mode == "publish":
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        click.echo(render(result))
        if mode != "try":
            page(name, render(result))

    modes = click.Choice(["publish", "try", "render"])  # try: publish nothing; render: measure nothing
    return click.command()(click.option("--mode", type=modes, default="publish", show_default=True)(run))
