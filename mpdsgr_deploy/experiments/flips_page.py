"""The page about flipped spikes: records as Markdown tables and a plot."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, geometric_mean, median, stdev

from matplotlib.figure import Figure

from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.diagnostics.picture import BLUE, GREEN, VERMILION, plain
from mpdsgr_deploy.experiments.flip_records import EXPORTED, FlipRecord, FlipRows, baselines, load, sweep
from mpdsgr_deploy.experiments.markdown import markdown, publish
from mpdsgr_deploy.experiments.table_plots import small_png

PAGE, PLOT = "README.md", "plot.png"
PRECISIONS = ("fp16", "int8", "fp8")
COLOURS = dict(zip(PRECISIONS, (BLUE, VERMILION, GREEN), strict=True))
PLACES = ("first product fp16", "first product int8", "last product fp16", "last product int8")


def write_page(folder: Path) -> Path:
    rows = load(folder)
    return publish(folder / PAGE, render(rows), {PLOT: plot(rows)} if rows else {})


def render(rows: FlipRows) -> str:
    parts = [
        "# Flips: what float16, int8 and float8 change in trained networks",
        "Rendered from `results.jsonl` by `mpdsgr table NAME ROWS --flips`. What it shows: [FINDINGS](FINDINGS.md).",
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


def rates(rows: FlipRows) -> str:
    """Show the flips and changed labels of each row in every precision, as means over seeds."""
    columns = ["table", "row", "method", "seeds", "n", "density"]
    columns += [f"{precision} {what}" for precision in PRECISIONS for what in ("flips", "own", "labels")]
    lines = []
    for (table, row), results in rows.items():
        first = results[0]
        seeds = ", ".join(str(r.seed) for r in results)
        cells = [table, row, first.method, seeds, str(first.n)]
        cells.append(spread([r.of("fp16").mean("density") for r in results], 3))
        for precision in PRECISIONS:
            flips = [r.of(precision) for r in results]
            cells.append(spread([100 * v.mean("rate") for v in flips], 3))
            cells.append(spread([100 * v.mean("fresh") for v in flips], 4))
            cells.append(spread([100 * v.labels_changed / r.n for v, r in zip(flips, results, strict=True)], 1))
        lines.append(cells)
    return markdown(columns, lines)


def spread(values: list[float], digits: int) -> str:
    """Format mean and standard deviation over seeds; for one seed, the mean alone."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def pair_up(rows: FlipRows) -> dict[tuple[str, str], list[tuple[FlipRecord, FlipRecord]]]:
    """Return pairs of equal seed, without and with MPD-SGR, by table and row. Sweeps over its weight are left out."""
    paired = {}
    swept = {(record.table, record.row) for record in sweep(rows)}
    for row, without in baselines(rows).items():
        if row not in swept:
            by_seed = {r.seed: r for r in rows[without]}
            paired[row] = [(by_seed[r.seed], r) for r in rows[row] if r.seed in by_seed]
    return paired


def pairs(rows: FlipRows) -> str:
    """Show the ratios of networks with MPD-SGR to those without, over pairs of equal seed."""
    columns = ["table", "row", "precision", "density", "own movement", "own flips", "all flips", "fewer flips"]
    columns += ["labels changed, without", "with"]
    lines = []
    for (table, row), networks in pair_up(rows).items():
        for precision in PRECISIONS:
            without, regularised = ([r.of(precision) for r in side] for side in zip(*networks, strict=True))
            ratios = []
            for field in ("density", "fresh_moved", "fresh", "rate"):
                each = [b.mean(field) / a.mean(field) for a, b in zip(without, regularised, strict=True)]
                ratios.append(f"{geometric_mean(each):.2f} [{min(each):.2f}, {max(each):.2f}]")
            fewer = sum(b.mean("rate") < a.mean("rate") for a, b in zip(without, regularised, strict=True))
            total = sum(without.n for without, _ in networks)
            labels = [f"{sum(v.labels_changed for v in side)} of {total}" for side in (without, regularised)]
            lines.append([table, row, precision, *ratios, f"{fewer} of {len(networks)} seeds", *labels])
    note = "With MPD-SGR divided by without, pairs of one seed: geometric mean [least, most]. Below 1: it has less."
    return f"{markdown(columns, lines)}\n\n{note}"


def law(rows: FlipRows) -> str:
    """Show how flips relate to density times movement, which predicts them, over the layers of all networks."""
    lines = []
    for precision in PRECISIONS:
        layers = [layer for r in every(rows) for layer in r.of(precision).layers.values() if layer.predicted > 0]
        flipping = [variant for r in every(rows) if (variant := r.of(precision)).mean("rate")]
        if not layers or not flipping:  # with few images there may be no flip
            lines.append([precision, "0", "", "", ""])
            continue
        own_flips = sorted(layer.fresh / layer.predicted for layer in layers)
        every_flip = [layer.rate / (layer.density * layer.moved) for layer in layers]
        tenth = len(own_flips) // 10
        passed_on = [1 - variant.mean("fresh") / variant.mean("rate") for variant in flipping]
        lines.append(
            [
                precision,
                str(len(own_flips)),
                f"{median(own_flips):.2f} [{own_flips[tenth]:.2f}, {own_flips[-1 - tenth]:.2f}]",
                f"{median(every_flip):.2f}",
                f"{100 * fmean(passed_on):.1f}",
            ]
        )
    columns = ["precision", "layers", "own flips / (density × own movement)", "all flips / (density × movement)"]
    note = (
        "Median over the layers of all networks [tenth, nine tenths]; layers that round nothing are left out. 1 is "
        "what a difference that does not depend on the potential predicts."
    )
    return f"{markdown([*columns, 'passed on, %'], lines)}\n\n{note}"


def typical(pairs: Iterable[tuple[float, float]]) -> str:
    """Format the geometric mean of the ratios a / b of pairs (a, b); "-" if a value is 0, for lack of flips."""
    values = list(pairs)
    return f"{geometric_mean(a / b for a, b in values):.2f}" if all(a and b for a, b in values) else "-"


def neurons(rows: FlipRows) -> str:
    """Compare networks with float16 neurons and with float32 neurons."""
    lines = []
    for precision in PRECISIONS:
        single = [r.of(precision) for r in every(rows)]
        half = [r.variants[f"{precision}, neurons fp16"] for r in every(rows)]
        both = list(zip(half, single, strict=True))
        cells = [precision, str(len(both))]
        cells += [typical((h.mean(field), s.mean(field)) for h, s in both) for field in ("fresh", "rate")]
        cells.append(f"{sum(h.mean('rate') > s.mean('rate') for h, s in both)} of {len(both)}")
        total = sum(r.n for r in every(rows))
        cells += [f"{sum(variant.labels_changed for variant in side)} of {total}" for side in (single, half)]
        lines.append(cells)
    columns = ["precision", "networks", "own flips, fp16 / fp32", "all flips, fp16 / fp32", "more flips with fp16"]
    return markdown([*columns, "labels changed, fp32", "fp16"], lines)


def places(rows: FlipRows) -> str:
    """Show the flips of int8 if its first or last product is in another precision than float32."""
    lines = []
    for name in (f"int8, {EXPORTED}", *PLACES):
        variants = [r.variants[name] for r in every(rows)]
        changed, total = sum(v.labels_changed for v in variants), sum(r.n for r in every(rows))
        int8 = (r.of("int8").mean("rate") for r in every(rows))
        relative = typical(zip((v.mean("rate") for v in variants), int8, strict=True))
        title = "int8, first and last product fp32" if name not in PLACES else name
        rate, movement = 100 * fmean(v.mean("rate") for v in variants), fmean(v.logits_moved for v in variants)
        lines.append([title, f"{rate:.3f}", relative, f"{movement:.3f}", f"{changed} of {total}"])
    note = (
        "int8 for the first product: the normalised image in 255 steps over its possible range; for the last: weights "
        "alone, since mean spikes lie on a grid. The last product has no spikes behind it."
    )
    columns = ["variant", "flips, %", "beside the first line", "movement of logits", "labels changed"]
    return f"{markdown(columns, lines)}\n\n{note}"


def every(rows: FlipRows) -> Iterable[FlipRecord]:
    return [result for results in rows.values() for result in results]


def sources(rows: FlipRows) -> str:
    lines = set()
    for result in every(rows):
        origin = result.provenance
        versions = ", ".join(f"{name} {origin['packages'][name]}" for name in ("torch", "onnx", "onnxruntime"))
        machine = origin["hardware"]
        lines.add(
            f"- {result.table}: {result.network}, {name_sample(result.n, result.data)}; {machine['cpu']}, "
            f"cores: {machine['cores']}; {versions}; revision {origin['revision']}"
        )
    return "\n".join(sorted(lines))


def plot(rows: FlipRows) -> bytes:
    """Plot own flips of every layer against their prediction, and flips against eta; return a PNG file."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    both, swept = [], sweep(rows)
    for precision, colour in COLOURS.items():
        layers = [layer for r in every(rows) for layer in r.of(precision).layers.values() if layer.fresh > 0]
        x, y = [layer.predicted for layer in layers], [layer.fresh for layer in layers]
        both += x + y
        left.plot(x, y, "o", color=colour, markersize=4, alpha=0.6, label=precision)
        means = [100 * record.of(precision).mean("rate") for record in swept]
        right.plot(range(len(swept)), means, "o-", color=colour, markersize=4, label=precision)
        right.set_xticks(range(len(swept)), [f"{record.eta:g}" for record in swept])
    if both:  # without a flip there is nothing to draw on logarithmic axes
        left.plot([min(both), max(both)], [min(both), max(both)], color="black", linewidth=0.8, label="equal")
        left.set(xscale="log", yscale="log")
    left.set(xlabel="density at the threshold × own mean |difference| of potentials")
    left.set(ylabel="flips by a layer's own rounding (share)", title="every layer of every network")
    right.set(xlabel="eta of MPD-SGR (CIFAR-10, one seed)", ylabel="all flips (%)", ylim=(0, None), title="dose")
    for axes in (left, right):
        plain(axes)
    left.legend(frameon=False)
    return small_png(figure)
