"""The page of a study: the effect of each method in each setting."""

from pathlib import Path
from statistics import correlation

from mpdsgr_deploy.attacks.condition import WORST
from mpdsgr_deploy.experiments import study_plots
from mpdsgr_deploy.experiments.effect import CONDITIONS, Pair, common_seeds, effect, emptied, pairs, pooled, verdict
from mpdsgr_deploy.experiments.markdown import markdown, publish
from mpdsgr_deploy.experiments.page_parts import behaviour, seeds, sources, unhealthy, unmeasured
from mpdsgr_deploy.experiments.records import Measured, load_measured
from mpdsgr_deploy.experiments.row_comparison import shorts
from mpdsgr_deploy.experiments.study import PREFIX, Study

PAGE, EFFECTS, DOSE, FRONT = "README.md", "effects.png", "dose.png", "front.png"
MORE, LESS = 2.0, 1.0  # in `goal`: the least gain under all attacks and the largest loss on clean images, in points
ENOUGH = 12  # smallest number of pairs for which a correlation is computed


def write_page(name: str, study: Study, folder: Path) -> Path:
    measured = load_measured(study.table(), folder)
    pictures = {}
    if compared := pairs(study, measured):
        pictures = {
            EFFECTS: study_plots.effects(study, compared),
            DOSE: study_plots.dose(study, compared),
            FRONT: study_plots.front(study, measured, compared),
        }
    return publish(folder / PAGE, render(name, study, measured), pictures)


def render(name: str, study: Study, measured: Measured) -> str:
    command = f"mpdsgr study {name.removeprefix(PREFIX)}"
    parts = [f"# {study.title}", f"Rendered from `results.jsonl` by `{command}`."]
    if study.set:
        parts.append(f"All runs: {', '.join(f'`{override}`' for override in study.set)}.")
    compared = pairs(study, measured)
    if compared:
        parts += [
            "## What each method changes",
            effects(study, compared),
            together(compared),
            goal(compared),
            f"![differences with their intervals]({EFFECTS})",
            "## By how much the window is emptied",
            f"![what survives all attacks against how much Omega falls]({DOSE})",
            dose(compared),
            behaviour(measured),
        ]
    if measured:
        parts += ["## Accuracies", accuracies(measured), unhealthy(measured)]
        parts += [f"![clean accuracy and what survives all attacks]({FRONT})"] if compared else []
    parts += ["## Methods and settings", meanings(study)]
    if measured:
        parts += ["## Where it was measured", sources(measured)]
    parts.append(unmeasured(study.table(), measured))
    return "\n\n".join(part for part in parts if part) + "\n"


def meanings(study: Study) -> str:
    methods = [[f"`{m.name}`", f"`{m.recipe}`", " ".join(f"`{o}`" for o in m.set) or "-"] for m in study.methods]
    settings = [[f"`{s.name}`", s.factor, " ".join(f"`{o}`" for o in s.set) or "-"] for s in study.settings]
    tables = markdown(["method", "recipe", "changed"], methods), markdown(["setting", "factor", "changed"], settings)
    return "\n\n".join(tables)


def effects(study: Study, compared: list[Pair]) -> str:
    """Show the effect of each method under every condition, and the verdict on it."""
    rows = []
    for setting, method, records, baseline in compared:
        cells = [str(effect(records, baseline, condition) or "-") for condition in CONDITIONS.values()]
        healthy = all(check.passed for record in (*records, *baseline) for check in record.attacked.health)
        marked = verdict(records, baseline) + ("" if healthy else " *")
        count = str(len(common_seeds(records, baseline)))
        emptier = f"{emptied(records, baseline):+.3f}"
        rows.append([setting.factor, setting.name, method.name, count, emptier, marked, *cells])
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


def together(compared: list[Pair]) -> str:
    """Show each method's mean effect under all attacks over its settings, and in how many it is lower or higher."""
    by_method: dict[str, list[tuple[float, Pair]]] = {}
    for pair in compared:
        if (union := effect(pair.records, pair.baseline, WORST)) is not None:
            by_method.setdefault(pair.method.name, []).append((union.mean, pair))
    lines = []
    for name, settings in by_method.items():
        means, average = [mean for mean, _ in settings], pooled([(p.records, p.baseline) for _, p in settings], WORST)
        if len(means) > 1 and average is not None:
            ways = f"lower in {sum(mean < 0 for mean in means)} and higher in {sum(mean > 0 for mean in means)}"
            lines.append(f"`{name}` {average} ({ways} of {len(means)} settings)")
    note = "the settings share seeds and images, which are what the intervals count."
    return f"Mean over settings under all attacks: {'; '.join(lines)}; {note}" if lines else ""


def dose(compared: list[Pair]) -> str:
    """Show the correlation between effects under all attacks and the decrease of Omega; empty for few pairs."""
    points = [
        (emptied(pair.records, pair.baseline), union.mean)
        for pair in compared
        if (union := effect(pair.records, pair.baseline, WORST)) is not None
    ]
    if len(points) < ENOUGH:
        return ""
    return f"Correlation of the two over {len(points)} pairs: {correlation(*zip(*points, strict=True)):+.2f}."


def goal(compared: list[Pair]) -> str:
    worthwhile = []
    for setting, method, records, baseline in compared:
        union, clean = (effect(records, baseline, CONDITIONS[heading]) for heading in ("union", "clean"))
        if union and clean and union.mean >= MORE and union.low > 0 and clean.mean >= -LESS:
            worthwhile.append(f"`{setting.name}` with `{method.name}`")
    return (
        f"At least {MORE:g} points more under all attacks, with an interval above zero, at a clean accuracy at most "
        f"{LESS:g} point lower: {', '.join(worthwhile) or 'none'}."
    )


def accuracies(measured: Measured) -> str:
    rows = []
    for title, records in measured.items():
        rows.append([title, seeds(records), str(records[0].attacked.n), *shorts(records, CONDITIONS)])
    note = "Accuracy in %: the mean over the seeds, ± the standard deviation between them."
    return markdown(["row", "seeds", "n", *CONDITIONS], rows) + f"\n\n{note}"
