"""The page of a study: what each method changes in each setting, as Markdown and as plots."""

from pathlib import Path
from statistics import correlation

from effect import HELPS, HURTS, MASKS, OPEN, Effect, common_seeds, effect, emptied, pooled, verdict
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measured import Measured, cell, load_results
from page import behaviour, seeds, sources, unhealthy
from plots import png
from result import Result
from study_table import Method, Setting, Study
from tabular import markdown

from mpdsgr_deploy.attacks.suite import WORST
from mpdsgr_deploy.files import write_atomic

PAGE, EFFECTS, DOSE, FRONT = "README.md", "effects.png", "dose.png", "front.png"
MORE, LESS = 2.0, 1.0  # points: under all attacks at least so many more, clean at most so many fewer
CONDITIONS = {
    "clean": "clean",
    "noise": "gaussian",
    "PGD": "pgd",
    "transfer": "transfer",
    "Square": "square",
    "strong": "pgd-strong",
    "union": WORST,
}
DRAWN = ("PGD", "Square", "union")
FEW = 12  # rows that a plot can name one by one
ENOUGH = 12  # pairs that a correlation says something of
BASELINE = "#000000"
COLOURS = {HELPS: "#009E73", MASKS: "#E69F00", HURTS: "#D55E00", OPEN: "#999999"}


def write_page(name: str, study: Study, folder: Path) -> Path:
    """Render the page and the plots of the results in `folder` into it."""
    measured = load_results(study.table(), folder)
    folder.mkdir(parents=True, exist_ok=True)
    if pairs(study, measured):
        write_atomic(folder / EFFECTS, draw_effects(study, measured))
        write_atomic(folder / DOSE, draw_dose(study, measured))
        write_atomic(folder / FRONT, draw_front(study, measured))
    write_atomic(folder / PAGE, render(name, study, measured).encode())
    return folder / PAGE


def pairs(study: Study, measured: Measured) -> list[tuple[Setting, Method, list[Result], list[Result]]]:
    """What is compared: each setting's methods that were measured, with the results of them and of their baselines."""
    found = []
    for setting in study.settings:
        for method in study.methods_of(setting):
            row, baseline = study.title_of(setting, method), study.baseline_of(setting)
            if row != baseline and row in measured and baseline in measured:
                found.append((setting, method, measured[row], measured[baseline]))
    return found


def render(name: str, study: Study, measured: Measured) -> str:
    """The whole page."""
    script = f"python train/study/study.py {name.removeprefix('study-')}"
    parts = [f"# {study.title}", f"Rendered from the JSON files beside it: `{script}`."]
    if study.set:
        parts.append(f"All runs: {', '.join(f'`{override}`' for override in study.set)}.")
    if pairs(study, measured):
        parts += [
            "## What each method changes",
            effects(study, measured),
            together(study, measured),
            goal(study, measured),
            f"![differences with their intervals]({EFFECTS})",
            "## By how much the window is emptied",
            f"![what survives all attacks against how much Omega falls]({DOSE})",
            dose(study, measured),
            behaviour(measured),
        ]
    if measured:
        parts += ["## Accuracies", accuracies(measured), unhealthy(measured)]
        parts += [f"![clean accuracy and what survives all attacks]({FRONT})"] if pairs(study, measured) else []
    parts += ["## Methods and settings", meanings(study)]
    if measured:
        parts += ["## Where it was measured", sources(measured)]
    missing = [row.title for row in study.table().rows if row.title not in measured]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def meanings(study: Study) -> str:
    """What each method and setting changes."""
    methods = [[f"`{m.name}`", f"`{m.recipe}`", " ".join(f"`{o}`" for o in m.set) or "-"] for m in study.methods]
    settings = [[f"`{s.name}`", s.factor, " ".join(f"`{o}`" for o in s.set) or "-"] for s in study.settings]
    tables = markdown(["method", "recipe", "changed"], methods), markdown(["setting", "factor", "changed"], settings)
    return "\n\n".join(tables)


def effects(study: Study, measured: Measured) -> str:
    """Differences in points under every condition, and the verdict."""
    rows = []
    for setting, method, results, baseline in pairs(study, measured):
        cells = [str(effect(results, baseline, condition) or "-") for condition in CONDITIONS.values()]
        said = verdict(results, baseline) + ("" if all(map(healthy, (*results, *baseline))) else " *")
        seeds = str(len(common_seeds(results, baseline)))
        emptier = f"{emptied(results, baseline):+.3f}"
        rows.append([setting.factor, setting.name, method.name, seeds, emptier, said, *cells])
    note = (
        f"Points of accuracy more than the baseline `{study.methods[0].name}` of the same setting (of the first one "
        "where it has none), paired by seed and image: mean, [95 % interval for the choice of seeds and of images; of "
        "images alone where there is one seed]. `helps` and `hurts`: the interval under all attacks together (`union`) "
        "excludes zero; `masks`: it does not, its mean is not above zero, and PGD in the paper's setting gains what "
        "the union does not; with one seed nothing is decided. Single intervals: of forty, one or two exclude zero by "
        "chance. `*`: a health check failed, see below. `emptier`: by how much Omega is lower. The attacks are the "
        f"gate's tier `{study.tier}`; `strong`: any iterate of the strong PGD; `transfer`: images that fool the "
        "baseline's network of the study's next seed (of the first, after the last). `-`: not measured, or no image "
        "left in either."
    )
    columns = ["factor", "setting", "method", "seeds", "emptier", "verdict", *CONDITIONS]
    return markdown(columns, rows) + f"\n\n{note}"


def healthy(result: Result) -> bool:
    """Whether every health check of its evaluation passed."""
    return all(check.passed for check in result.evaluation.health)


def together(study: Study, measured: Measured) -> str:
    """What a method of several settings does under all attacks on average, and in how many which way."""
    methods: dict[str, list[tuple[list[Result], list[Result]]]] = {}
    signs: dict[str, list[float]] = {}
    for _, method, results, baseline in pairs(study, measured):
        if (found := effect(results, baseline, WORST)) is not None:
            methods.setdefault(method.name, []).append((results, baseline))
            signs.setdefault(method.name, []).append(found.mean)
    lines = []
    for name, compared in methods.items():
        means, average = signs[name], pooled(compared, WORST)
        if len(means) > 1 and average is not None:
            ways = f"lower in {sum(mean < 0 for mean in means)} and higher in {sum(mean > 0 for mean in means)}"
            lines.append(f"`{name}` {average} ({ways} of {len(means)} settings)")
    note = "the settings share seeds and images, which are what the intervals count."
    return f"Mean over settings under all attacks: {'; '.join(lines)}; {note}" if lines else ""


def dose(study: Study, measured: Measured) -> str:
    """Whether what a method does follows how far it empties the window, whatever the setting."""
    found = [
        (emptied(results, baseline), union.mean)
        for _, _, results, baseline in pairs(study, measured)
        if (union := effect(results, baseline, CONDITIONS["union"])) is not None
    ]
    if len(found) < ENOUGH:
        return ""
    return f"Correlation of the two over {len(found)} pairs: {correlation(*zip(*found, strict=True)):+.2f}."


def goal(study: Study, measured: Measured) -> str:
    """Which methods are worth having, by what they gain and cost."""
    found = []
    for setting, method, results, baseline in pairs(study, measured):
        union, clean = (effect(results, baseline, CONDITIONS[heading]) for heading in ("union", "clean"))
        if union and clean and union.mean >= MORE and union.low > 0 and clean.mean >= -LESS:
            found.append(f"`{setting.name}` with `{method.name}`")
    return (
        f"At least {MORE:g} points more under all attacks, with an interval above zero, at a clean accuracy at most "
        f"{LESS:g} point lower: {', '.join(found) or 'none'}."
    )


def accuracies(measured: Measured) -> str:
    """Every row under every condition."""
    rows = []
    for title, results in measured.items():
        cells = [str(cell(results, condition) or "-").partition(" [")[0] for condition in CONDITIONS.values()]
        rows.append([title, seeds(results), str(results[0].evaluation.rows[0].n), *cells])
    note = "Accuracy in %: the mean over the seeds, ± the standard deviation between them."
    return markdown(["row", "seeds", "n", *CONDITIONS], rows) + f"\n\n{note}"


def draw_effects(study: Study, measured: Measured) -> bytes:
    """Differences with intervals: by gradients as the paper attacks, without gradients, and under all attacks."""
    found = pairs(study, measured)
    figure = Figure(figsize=(13, 1.2 + 0.24 * len(found)), layout="constrained")
    panels = figure.subplots(1, len(DRAWN), sharex=True, sharey=True)
    for axes, heading in zip(panels, DRAWN, strict=True):
        for position, (_, _, results, baseline) in enumerate(found):
            draw_effect(axes, position, effect(results, baseline, CONDITIONS[heading]))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"points under {heading}")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(found)), [f"{setting.name}  {method.name}" for setting, method, *_ in found])
    panels[0].set_ylim(len(found) - 0.5, -0.5)
    figure.suptitle("colour: the interval excludes zero", fontsize=9)
    return png(figure)


def draw_effect(axes: Axes, position: int, found: Effect | None) -> None:
    """One line of it."""
    if found is not None:
        colour = COLOURS[HELPS if found.low > 0 else HURTS if found.high < 0 else OPEN]
        axes.plot([found.low, found.high], [position, position], color=colour)
        axes.plot([found.mean], [position], "o", color=colour, markersize=4)


def draw_dose(study: Study, measured: Measured) -> bytes:
    """What survives all attacks against how much Omega falls, one point a method and setting."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for setting, method, results, baseline in pairs(study, measured):
        if (union := effect(results, baseline, CONDITIONS["union"])) is None:
            continue
        said, x = verdict(results, baseline), emptied(results, baseline)
        axes.plot([x, x], [union.low, union.high], color=COLOURS[said], linewidth=0.6, alpha=0.5)
        axes.plot([x], [union.mean], "o", color=COLOURS[said], markersize=5)
        if said != OPEN:
            label(axes, f"{setting.name} {method.name}", x, union.mean)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="Omega less than the baseline's", ylabel="points more under all attacks")
    verdicts_told(axes)
    return png(figure)


def draw_front(study: Study, measured: Measured) -> bytes:
    """Clean accuracy against what survives all attacks, one point a row, with the intervals over images."""
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    verdicts = {found[0].row: verdict(found, baseline) for _, _, found, baseline in pairs(study, measured)}
    for title, results in measured.items():
        clean, union = (cell(results, CONDITIONS[heading]) for heading in ("clean", "union"))
        if clean is None or union is None:
            continue
        colour = COLOURS[verdicts[title]] if title in verdicts else BASELINE
        low, high = union.interval
        axes.plot([clean.mean] * 2, [low, high], color=colour, linewidth=0.6, alpha=0.5)
        axes.plot([clean.mean], [union.mean], "o", color=colour, markersize=5)
        if verdicts.get(title) != OPEN or len(measured) <= FEW:
            label(axes, title, clean.mean, union.mean)
    axes.set(xlabel="clean accuracy (%)", ylabel="right under all attacks (%)")
    axes.plot([], [], "o", color=BASELINE, label="baseline")
    verdicts_told(axes)
    return png(figure)


def label(axes: Axes, text: str, x: float, y: float) -> None:
    """Beside a point."""
    axes.annotate(text, (x, y), fontsize=6, xytext=(4, 2), textcoords="offset points")


def verdicts_told(axes: Axes) -> None:
    """A legend of the colours."""
    for name, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=name)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
