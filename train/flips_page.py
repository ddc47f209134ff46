"""The page of flips: what its results files hold, as Markdown and as a plot."""

import io
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, geometric_mean, median, stdev
from typing import Any, NamedTuple

from page import PAGE, PLOT, markdown
from pydantic import BaseModel

from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.schema import read_document

RESULTS = Path(__file__).parent / "results" / "flips"
SCHEMA_VERSION = 1
PRECISIONS = ("fp16", "int8", "fp8")
COLOURS = dict(zip(PRECISIONS, ("#0072B2", "#D55E00", "#009E73"), strict=True))  # Okabe and Ito's
EXPORTED = "neurons fp32"  # the neurons of the main tables
PLACES = ("first product fp16", "first product int8", "last product fp16", "last product int8")
PAIRS = (("reg", "mpdsgr"), ("at", "at-mpdsgr"))  # rows that MPD-SGR alone sets apart


class LayerFlips(BaseModel):
    """Means over a layer's steps, as `StepFlips` has them; predicted: of density times fresh_moved, step by step."""

    firing_rate: float
    density: float
    rate: float
    moved: float
    fresh: float
    fresh_moved: float
    predicted: float


class VariantFlips(BaseModel):
    """A variant against float32, as `Flips` has it, by layer."""

    labels_changed: int
    unflipped: int
    logits_moved: float
    layers: dict[str, LayerFlips]

    def mean(self, field: str) -> float:
        """Of a field over layers, each with the same weight."""
        return fmean(getattr(layer, field) for layer in self.layers.values())


class FlipResult(BaseModel):
    """One trained network."""

    schema_version: int = SCHEMA_VERSION
    table: str
    row: str
    seed: int
    method: str
    network: str
    weights_sha256: str
    data: str
    n: int
    variants: dict[str, VariantFlips]
    provenance: dict[str, Any]

    def of(self, precision: str) -> VariantFlips:
        """The variant of a precision whose neurons compute in float32."""
        return self.variants[f"{precision}, {EXPORTED}"]


Rows = dict[tuple[str, str], list[FlipResult]]  # (table, row) -> its seeds


def write_page(folder: Path) -> Path:
    """Render the page and the plot of the results in `folder` into it."""
    rows = load(folder)
    if rows:
        write_atomic(folder / PLOT, plot(rows))
    write_atomic(folder / PAGE, render(rows).encode())
    return folder / PAGE


def load(folder: Path) -> Rows:
    """All results of a folder."""
    found = [read_document(p, FlipResult, SCHEMA_VERSION, otherwise="measure again") for p in folder.glob("*.json")]
    rows: Rows = {}
    for result in sorted(found, key=lambda r: (r.table, strength(r), r.row, r.seed)):
        rows.setdefault((result.table, result.row), []).append(result)
    return rows


def render(rows: Rows) -> str:
    """The whole page."""
    parts = [
        "# Flips: what float16, int8 and float8 change in trained networks",
        "Rendered from the JSON files beside it: `python train/flips.py RUNS`. What it shows: [FINDINGS](FINDINGS.md).",
        "`flips`: share of spikes that differ from those of the float32 network, in %; `own`: those a layer makes by "
        "its own rounding, given the float32 network's spikes; `labels`: predictions that change, in %; `density`: of "
        "the float32 potentials at the threshold, per unit of potential, from those within 5 % of it; `movement`: mean "
        "absolute difference of the potentials, or of the logits. Means over layers (each with the same weight), steps "
        "and seeds, ± the deviation between seeds. Neurons compute in float32; in int8 and fp8 the first and the last "
        "product too.",
    ]
    if rows:
        parts += ["## Every precision", rates(rows), f"![flips against what predicts them]({PLOT})"]
        parts += ["## MPD-SGR beside the same training without it", pairs(rows)]
        parts += ["## Why a spike flips", law(rows)]
        parts += ["## Neurons in float32 or float16", neurons(rows)]
        parts += ["## The first and the last product", places(rows), "## Where it was measured", sources(rows)]
    return "\n\n".join(parts) + "\n"


def rates(rows: Rows) -> str:
    """Flips of every row in every precision."""
    columns = ["table", "row", "method", "seeds", "n", "density"]
    columns += [f"{precision} {what}" for precision in PRECISIONS for what in ("flips", "own", "labels")]
    lines = []
    for (table, row), results in rows.items():
        first = results[0]
        seeds = ", ".join(str(r.seed) for r in results)
        cells = [table, row, first.method, seeds, str(first.n)]
        cells.append(spread([r.of("fp16").mean("density") for r in results], 3))
        for precision in PRECISIONS:
            found = [(r.of(precision), r.n) for r in results]
            cells.append(spread([100 * v.mean("rate") for v, _ in found], 3))
            cells.append(spread([100 * v.mean("fresh") for v, _ in found], 4))
            cells.append(spread([100 * v.labels_changed / n for v, n in found], 1))
        lines.append(cells)
    return markdown(columns, lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± deviation between seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


class Pair(NamedTuple):
    """Two networks of one table and seed: without and with MPD-SGR."""

    without: FlipResult
    regularised: FlipResult


def pair_up(rows: Rows) -> dict[tuple[str, str], list[Pair]]:
    """The pairs of every table, by table and row with MPD-SGR."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for table, row in rows:
        for without, regularised in PAIRS:
            if row == regularised and (table, without) in rows:
                by_seed = {r.seed: r for r in rows[table, without]}
                pairs = [Pair(by_seed[r.seed], r) for r in rows[table, row] if r.seed in by_seed]
                found[table, row] = pairs
    return found


def pairs(rows: Rows) -> str:
    """With MPD-SGR over without, seed by seed."""
    columns = ["table", "row", "precision", "density", "own movement", "own flips", "all flips", "fewer flips"]
    columns += ["labels changed, without", "with"]
    lines = []
    for (table, row), found in pair_up(rows).items():
        for precision in PRECISIONS:
            without, regularised = ([r.of(precision) for r in side] for side in zip(*found, strict=True))
            ratios = []
            for field in ("density", "fresh_moved", "fresh", "rate"):
                each = [b.mean(field) / a.mean(field) for a, b in zip(without, regularised, strict=True)]
                ratios.append(f"{geometric_mean(each):.2f} [{min(each):.2f}, {max(each):.2f}]")
            fewer = sum(b.mean("rate") < a.mean("rate") for a, b in zip(without, regularised, strict=True))
            total = sum(pair.without.n for pair in found)
            labels = [f"{sum(v.labels_changed for v in side)} of {total}" for side in (without, regularised)]
            lines.append([table, row, precision, *ratios, f"{fewer} of {len(found)} seeds", *labels])
    note = "With MPD-SGR divided by without, pairs of one seed: geometric mean [least, most]. Below 1: it has less."
    return f"{markdown(columns, lines)}\n\n{note}"


def law(rows: Rows) -> str:
    """Own flips over density times own movement, layer by layer."""
    lines = []
    for precision in PRECISIONS:
        layers = [layer for r in every(rows) for layer in r.of(precision).layers.values() if layer.predicted > 0]
        flipping = [variant for r in every(rows) if (variant := r.of(precision)).mean("rate")]
        if not layers or not flipping:  # on few images it may be that nothing flips
            lines.append([precision, "0", "", "", ""])
            continue
        own = sorted(layer.fresh / layer.predicted for layer in layers)
        passed = [layer.rate / (layer.density * layer.moved) for layer in layers]
        tenth = len(own) // 10
        share = [1 - variant.mean("fresh") / variant.mean("rate") for variant in flipping]
        lines.append(
            [
                precision,
                str(len(own)),
                f"{median(own):.2f} [{own[tenth]:.2f}, {own[-1 - tenth]:.2f}]",
                f"{median(passed):.2f}",
                f"{100 * fmean(share):.1f}",
            ]
        )
    columns = [
        "precision",
        "layers",
        "own flips / (density × own movement)",
        "all flips / (density × movement)",
    ]
    note = (
        "Median over the layers of all networks [tenth, nine tenths]; layers that round nothing are left out. 1 is "
        "what a difference that does not depend on the potential predicts."
    )
    return f"{markdown([*columns, 'passed on, %'], lines)}\n\n{note}"


def typical(pairs: Iterable[tuple[float, float]]) -> str:
    """The geometric mean of ratios; "-" where something is 0, as in a network too small to flip anything."""
    found = list(pairs)
    return f"{geometric_mean(a / b for a, b in found):.2f}" if all(a and b for a, b in found) else "-"


def neurons(rows: Rows) -> str:
    """float16 neurons beside float32 ones, network by network."""
    lines = []
    for precision in PRECISIONS:
        found = [(r.of(precision), r.variants[f"{precision}, neurons fp16"], r.n) for r in every(rows)]
        cells = [precision, str(len(found))]
        for field in ("fresh", "rate"):
            cells.append(typical((half.mean(field), single.mean(field)) for single, half, _ in found))
        cells.append(f"{sum(half.mean('rate') > single.mean('rate') for single, half, _ in found)} of {len(found)}")
        total = sum(n for *_, n in found)
        cells += [f"{sum(pair[i].labels_changed for pair in found)} of {total}" for i in (0, 1)]
        lines.append(cells)
    columns = ["precision", "networks", "own flips, fp16 / fp32", "all flips, fp16 / fp32", "more flips with fp16"]
    return markdown([*columns, "labels changed, fp32", "fp16"], lines)


def places(rows: Rows) -> str:
    """What int8 costs with another precision of its first or last product."""
    lines = []
    for name in (f"int8, {EXPORTED}", *PLACES):
        found = [(r.variants[name], r.n) for r in every(rows)]
        changed, total = sum(v.labels_changed for v, _ in found), sum(n for _, n in found)
        relative = ((v.mean("rate"), r.of("int8").mean("rate")) for (v, _), r in zip(found, every(rows), strict=True))
        moved = [v.logits_moved for v, _ in found]
        title = "int8, first and last product fp32" if name.startswith("int8") else name
        rate = f"{100 * fmean(v.mean('rate') for v, _ in found):.3f}"
        lines.append([title, rate, typical(relative), f"{fmean(moved):.3f}", f"{changed} of {total}"])
    note = (
        "int8 for the first product: the normalised image in 255 steps over its possible range; for the last: weights "
        "alone, since mean spikes lie on a grid. The last product has no spikes behind it."
    )
    columns = ["variant", "flips, %", "beside the first line", "movement of logits", "labels changed"]
    return f"{markdown(columns, lines)}\n\n{note}"


def every(rows: Rows) -> Iterable[FlipResult]:
    """All networks."""
    return [result for results in rows.values() for result in results]


def sources(rows: Rows) -> str:
    """Networks, images, hardware and versions, each distinct line once."""
    lines = set()
    for result in every(rows):
        found = result.provenance
        versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "onnx", "onnxruntime"))
        machine = found["hardware"]
        lines.add(
            f"- {result.table}: {result.network}, the first {result.n} test images of {result.data}; {machine['cpu']}, "
            f"cores: {machine['cores']}; {versions}; revision {found['revision']}"
        )
    return "\n".join(sorted(lines))


def plot(rows: Rows) -> bytes:
    """A PNG: own flips of every layer against what the density predicts, and flips against eta."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    both = []
    for precision, colour in COLOURS.items():
        layers = [layer for r in every(rows) for layer in r.of(precision).layers.values() if layer.fresh > 0]
        x, y = [layer.predicted for layer in layers], [layer.fresh for layer in layers]
        both += x + y
        left.plot(x, y, "o", color=colour, markersize=4, alpha=0.6, label=precision)
        sweep = sorted(((strength(r[0]), r[0]) for key, r in rows.items() if is_sweep(key)), key=lambda pair: pair[0])
        means = [100 * r.of(precision).mean("rate") for _, r in sweep]
        right.plot(range(len(sweep)), means, "o-", color=colour, markersize=4, label=precision)
        right.set_xticks(range(len(sweep)), [f"{eta:g}" for eta, _ in sweep])
    left.plot([min(both), max(both)], [min(both), max(both)], color="black", linewidth=0.8, label="equal")
    left.set(xscale="log", yscale="log", xlabel="density at the threshold × own mean |difference| of potentials")
    left.set(ylabel="flips by a layer's own rounding (share)", title="every layer of every network")
    right.set(xlabel="eta of MPD-SGR (CIFAR-10, one seed)", ylabel="all flips (%)", ylim=(0, None), title="dose")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def is_sweep(key: tuple[str, str]) -> bool:
    """Whether a row is one of the sweep over eta, its network without MPD-SGR included."""
    table, row = key
    return table == "mpdsgr-cifar10" and (row.startswith("eta-") or row.endswith("-reg"))


def strength(result: FlipResult) -> float:
    """eta, which a row of the sweep has in its name; 0 without MPD-SGR."""
    return float(result.row.removeprefix("eta-")) if result.row.startswith("eta-") else 0.0
