"""How every benchmark takes turns, summarises, publishes and renders; the scripts say only what is measured."""

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

FOLDER = Path(__file__).parent
RESULTS, PAGES = FOLDER / "results", [FOLDER / "README.md", FOLDER.parent / "export" / "README.md"]


def take_turns(each: Mapping[str, Callable[[], Any]], turns: int, *, warm_up: int = 1) -> dict[str, list[Any]]:
    """Samples of each, in an order that rotates against disturbances; those of turns to warm up are left out."""
    names, samples = list(each), list[dict[str, Any]]()
    for turn in range(-warm_up, turns):
        first = turn % len(names)
        samples.append({name: each[name]() for name in names[first:] + names[:first]})
    return {name: [sample[name] for sample in samples[warm_up:]] for name in names}


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, with the work that it queued on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    started = clock()
    call()
    wait()
    return round(clock() - started, 7)


def interval(n: int) -> tuple[int, float]:
    """k - 1 and coverage of a median's interval, k-th smallest to k-th largest of n samples: 95 % or more if n > 5."""
    covers = [1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    return max(((k, share) for k, share in enumerate(covers) if share >= 0.95), default=(0, covers[0]))


def spread(values: Sequence[float], below: Sequence[float] | None = None, form: str = "{:.2f}") -> str:
    """Median and interval of the values, or of their ratios to `below` in the same turn; one value has no interval."""
    ordered = sorted(values if below is None else [a / b for a, b in zip(values, below, strict=True)])
    k, _ = interval(len(ordered))
    middle, *ends = (form.format(value) for value in (statistics.median(ordered), ordered[k], ordered[-1 - k]))
    return f"{middle} [{', '.join(ends)}]" if len(ordered) > 1 else middle


def paired(n: int, what: str = "turns") -> str:
    """What the brackets of `spread` are, for n of them."""
    return f"median [{interval(n)[1]:.0%} interval] of n = {n} paired {what}"


def table(header: Sequence[str], rows: Iterable[Iterable[object]], *notes: str) -> str:
    """A Markdown table with notes below."""
    head, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *body, "", *notes, ""])


def source(result: dict[str, Any]) -> str:
    """Where a result comes from, in one line."""
    made, machine = result["provenance"], result["provenance"]["hardware"]
    device = " + ".join([f"{machine['cores']} cores of {machine['cpu']}", *machine.get("gpus", [])])
    commit, plus, dirty = (made["revision"] or "unknown").partition("+")
    return f"{device}; torch {made['packages']['torch']}; revision {commit[:12]}{plus}{dirty}; {made['created'][:10]}."


def load(name: str) -> dict[str, Any]:
    """The result that benchmarks/NAME.py wrote."""
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def page(name: str, body: str) -> tuple[Path, str]:
    """The page that has a place for the table of benchmarks/NAME.py, and its text with `body` in that place."""
    begin, end = f"<!-- table: python benchmarks/{name}.py -->\n", f"<!-- end of {name} -->\n"
    file = next(file for file in PAGES if begin in file.read_text())
    before, rest = file.read_text().split(begin)
    return file, f"{before}{begin}{body}{end}{rest.split(end)[1]}"


def command(name: str, measure: Callable[..., dict[str, Any]], render: Callable[[Any], str]) -> click.Command:
    """The command line of benchmarks/NAME.py, with the options of `measure`."""

    @click.command()
    @click.option("--mode", type=click.Choice(["publish", "try", "render"]), default="publish", show_default=True)
    @functools.wraps(measure)
    def run(mode: str, **options: Any) -> None:  # try: publish nothing; render: measure nothing
        result = load(name) if mode == "render" else {**measure(**options), "provenance": provenance()}
        if mode == "publish":
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        click.echo(render(result))
        if mode != "try":
            Path.write_text(*page(name, render(result)))

    return run
